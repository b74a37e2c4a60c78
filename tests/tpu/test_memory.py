import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
memory = runpy.run_path(str(ROOT / "tpu" / "memory.py"))
MODELS = {model.name: model for model in memory["MODELS"]}
CHIPS = {chip.name: chip for chip in memory["CHIPS"]}


@pytest.mark.parametrize(
    "name, published",
    # What the checkpoints on the hub hold; Qwen2.5 has biases of q, k and v, which the count leaves out.
    [
        ("Llama-3.2-1B", 1_235_814_400),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Qwen2.5-0.5B", 494_032_768 - 24 * (896 + 2 * 128)),
        ("Qwen2.5-32B", 32_763_876_352 - 64 * (5_120 + 2 * 1_024)),
    ],
)
def test_the_shapes_have_the_published_number_of_parameters(name, published):
    assert MODELS[name].parameters == published


def test_bytes_by_hand():
    needed = memory["stages"](MODELS["Llama-3.1-8B"])
    assert needed["SFT"] == 16 * 8_030_261_248
    assert needed["DPO"] == 18 * 8_030_261_248
    assert needed["PPO, four models"] == 36 * 8_030_261_248
    # Rank 16, 32 layers: q and o 8192 in and out, k and v 5120, gate, up and down 18432.
    adapter = 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert needed["PPO, one trunk"] == 2 * 16 * adapter + 2 * (8_030_261_248 + adapter)
    assert MODELS["Llama-3.1-8B"].cache == 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, width, bfloat16


def test_the_mesh_is_the_smallest_that_holds_it():
    mesh, model = memory["mesh"], MODELS["Qwen2.5-0.5B"]
    assert mesh(model, "SFT", 8e9, CHIPS["v5e"]) == "1×1×1"  # half of 16 GB, exactly
    assert mesh(model, "SFT", 8e9 + 1, CHIPS["v5e"]) == "1×4×1"
    assert mesh(model, "SFT", 2048e9 + 1, CHIPS["v5e"]) == "–"
    assert mesh(model, "PPO, four models", 32e9, CHIPS["v5e"]) == "1×2×2"  # two key-value heads
    assert mesh(MODELS["Llama-3.1-8B"], "PPO, four models", 64e9, CHIPS["v5e"]) == "1×2×4"


def test_the_readme_shows_what_the_command_prints():
    text = (ROOT / "tpu" / "README.md").read_text()
    assert memory["table"]() in text and memory["hours"]() in text


def test_chip_hours_by_hand():
    # 6 · 8.03e9 · 1e9 / (197e12 · 0.4) / 3600 = 169.9
    assert "| Llama-3.1-8B | 8.03 | 131 | 170 | 36 | 73 |" in memory["hours"]()
