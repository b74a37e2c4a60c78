"""The model as it samples token by token: its layers apart, where their stack would be copied for each token."""

from dataclasses import replace
from typing import Any

from rlhf_jax.models import KVCache, Transformer
from rlhf_jax.models.weights import flat, layers_apart, nested


def decoder_of(model: Transformer, params: Any) -> tuple[Transformer, Any]:
    """The model and the parameters that sample: with layers apart, where the config wants that.

    Traceable. The cache that the model itself has filled goes on as that of `cache_apart`.
    """
    config = model.config
    if not (config.scan_layers and config.apart_when_decoding):
        return model, params
    apart = nested(layers_apart(config, flat(params)))
    return Transformer(replace(config, scan_layers=False, remat=False)), apart


def cache_apart(cache: KVCache, decoder: Transformer) -> KVCache:
    """The cache as the decoder takes it: a stacked one as a tuple of layers, where its layers are apart."""
    if decoder.config.scan_layers or isinstance(cache.keys, tuple):
        return cache
    keys, values = (tuple(x[i] for i in range(len(x))) for x in (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)
