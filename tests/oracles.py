"""Every equation once more, as float64 loops over plain numpy: slow, obvious, and independent of the package."""

import math

import numpy as np


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def mean(numbers):
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def unmasked(mask):
    return [tuple(index) for index in np.argwhere(mask)]


def whiten(x, mask, shift_mean=True):
    mu = mean(x[i] for i in unmasked(mask))
    variance = mean((x[i] - mu) ** 2 for i in unmasked(mask))
    out = np.zeros(x.shape)
    for i in unmasked(mask):
        out[i] = (x[i] - mu) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mu)
    return out


def log_softmax(logits):
    out = np.empty(logits.shape)
    for index in np.ndindex(logits.shape[:-1]):
        row = [float(x) for x in logits[index]]
        top = max(row)
        total = math.fsum(math.exp(x - top) for x in row)
        out[index] = [x - top - math.log(total) for x in row]
    return out


def token_logprobs(logits, targets):
    logprobs, out = log_softmax(logits), np.empty(targets.shape)
    for index in np.ndindex(targets.shape):
        out[index] = logprobs[index][targets[index]]
    return out


def token_entropy(logits):
    logprobs, out = log_softmax(logits), np.empty(logits.shape[:-1])
    for index in np.ndindex(out.shape):
        out[index] = -math.fsum(math.exp(logp) * logp for logp in logprobs[index] if logp > -math.inf)
    return out


def kl_exact(logits, ref_logits):
    p, q = log_softmax(logits), log_softmax(ref_logits)
    out = np.empty(logits.shape[:-1])
    for index in np.ndindex(out.shape):
        terms = zip(p[index], q[index], strict=True)
        out[index] = math.fsum(math.exp(a) * (a - b) for a, b in terms if a > -math.inf)
    return out


def kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, *, beta):
    out = np.zeros(logprobs.shape)
    for b in range(len(scores)):
        steps = [t for t in range(mask.shape[1]) if mask[b, t]]
        for t in steps:
            out[b, t] = -beta * (logprobs[b, t] - ref_logprobs[b, t])
        if steps:
            out[b, steps[-1]] += scores[b]
    return out


def gae(rewards, values, mask, *, gamma, lam):
    """The sum of eq. 16 itself, not its recursion: Â_t = Σ_l (γλ)^l δ_{t+l} over the unmasked steps."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        steps = [t for t in range(rewards.shape[1]) if mask[b, t]]
        v = [float(values[b, t]) for t in steps] + [0.0]
        deltas = [rewards[b, t] + gamma * v[k + 1] - v[k] for k, t in enumerate(steps)]
        for k, t in enumerate(steps):
            advantages[b, t] = math.fsum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(steps)))
            returns[b, t] = advantages[b, t] + v[k]
    return advantages, returns


def group_advantages(rewards, *, group_size, scale_by_std):
    out = []
    for start in range(0, len(rewards), group_size):
        group = [float(r) for r in rewards[start : start + group_size]]
        mu = mean(group)
        std = math.sqrt(mean((r - mu) ** 2 for r in group))
        out += [(r - mu) / (std + 1e-4 if scale_by_std else 1.0) for r in group]
    return np.array(out)


def leave_one_out_advantages(rewards, *, group_size):
    out = []
    for start in range(0, len(rewards), group_size):
        group = [float(r) for r in rewards[start : start + group_size]]
        out += [r - mean(group[:i] + group[i + 1 :]) for i, r in enumerate(group)]
    return np.array(out)


def sft_loss(logprobs, mask):
    return -mean(logprobs[i] for i in unmasked(mask))


def clipped_surrogate(logprob, old_logprob, advantage, low, high):
    ratio = math.exp(logprob - old_logprob)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def ppo_clip_loss(logprobs, old_logprobs, advantages, mask, *, clip_eps):
    return mean(
        clipped_surrogate(logprobs[i], old_logprobs[i], advantages[i], clip_eps, clip_eps) for i in unmasked(mask)
    )


def value_clip_loss(values, old_values, returns, mask, *, clip_eps):
    losses = []
    for i in unmasked(mask):
        clipped = min(max(values[i], old_values[i] - clip_eps), old_values[i] + clip_eps)
        losses.append(0.5 * max((values[i] - returns[i]) ** 2, (clipped - returns[i]) ** 2))
    return mean(losses)


def averaged(terms, mask, reduce):
    """The average that a reduction names, of {(b, t): number}."""
    name = "masked_mean" if reduce is None else getattr(reduce, "func", reduce).__name__
    if name == "masked_mean":
        return mean(terms.values())
    if name == "sequence_mean":
        rows = [[x for (b, _), x in terms.items() if b == row] for row in range(len(mask))]
        return mean(mean(row) for row in rows if row)
    return math.fsum(terms.values()) / (len(mask) * reduce.keywords["length"])


def grpo_loss(
    logprobs, old_logprobs, ref_logprobs, advantages, mask, *, clip_eps_low, clip_eps_high, beta, reduce=None,
    weights=None,
):  # fmt: skip
    terms = {}
    for b, t in unmasked(mask):
        log_r = ref_logprobs[b, t] - logprobs[b, t]
        surrogate = clipped_surrogate(logprobs[b, t], old_logprobs[b, t], advantages[b], clip_eps_low, clip_eps_high)
        weight = 1.0 if weights is None else weights[b, t]
        terms[b, t] = weight * surrogate + beta * (math.exp(log_r) - 1 - log_r)
    return averaged(terms, mask, reduce)


def gspo_loss(logprobs, old_logprobs, advantages, mask, *, clip_eps_low, clip_eps_high):
    losses = []
    for b in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        if tokens:
            log_s = mean(logprobs[b, t] - old_logprobs[b, t] for t in tokens)
            losses.append(clipped_surrogate(log_s, 0.0, advantages[b], clip_eps_low, clip_eps_high))
    return mean(losses)


def cispo_loss(logprobs, old_logprobs, advantages, mask, *, clip_eps_low, clip_eps_high, reduce=None):
    terms = {}
    for b, t in unmasked(mask):
        rho = min(max(math.exp(logprobs[b, t] - old_logprobs[b, t]), 1 - clip_eps_low), 1 + clip_eps_high)
        terms[b, t] = -rho * advantages[b] * logprobs[b, t]
    return averaged(terms, mask, reduce)


def reinforce_loss(logprobs, advantages, mask, *, reduce=None, weights=None):
    terms = {
        (b, t): -(1.0 if weights is None else weights[b, t]) * advantages[b] * logprobs[b, t]
        for b, t in unmasked(mask)
    }
    return averaged(terms, mask, reduce)


def bradley_terry_loss(chosen_rewards, rejected_rewards, *, margin=0.0):
    margins = np.broadcast_to(margin, chosen_rewards.shape)
    return -mean(log_sigmoid(c - r - m) for c, r, m in zip(chosen_rewards, rejected_rewards, margins, strict=True))


def ensemble(scores, combine, lam):
    found = []
    for answer in zip(*scores, strict=True):
        mu = mean(answer)
        variance = mean((score - mu) ** 2 for score in answer)
        lower = {"lower": mu - lam * math.sqrt(variance), "uwo": mu - lam * variance, "spread": math.sqrt(variance)}
        found.append({"mean": mu, "min": min(answer), **lower}[combine])
    return np.array(found)


def ranking_loss(rewards, ranks, mask, *, margin=0.0, label_smoothing=0.0):
    losses = []
    margins, doubts = (np.broadcast_to(x, len(rewards)) for x in (margin, label_smoothing))
    for b, (m, doubt) in enumerate(zip(margins, doubts, strict=True)):
        real = [k for k in range(rewards.shape[1]) if mask[b, k]]
        differences = [rewards[b, w] - rewards[b, x] for w in real for x in real if ranks[b, w] < ranks[b, x]]
        if differences:
            losses.append(-mean((1 - doubt) * log_sigmoid(d - m) + doubt * log_sigmoid(-d - m) for d in differences))
    return mean(losses)


def plackett_luce_loss(rewards, ranks, mask):
    losses = []
    for b in range(len(rewards)):
        real = [k for k in range(rewards.shape[1]) if mask[b, k]]
        loss = 0.0
        for k in real:
            rivals = [j for j in real if j == k or ranks[b, j] > ranks[b, k]]
            loss -= math.log(math.exp(rewards[b, k]) / math.fsum(math.exp(rewards[b, j]) for j in rivals))
        if real:
            losses.append(loss)
    return mean(losses)


def log_ratio_differences(chosen, rejected, ref_chosen, ref_rejected):
    return [(c - rc) - (r - rr) for c, r, rc, rr in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)]


def dpo_loss(
    chosen_logprobs,
    rejected_logprobs,
    ref_chosen_logprobs,
    ref_rejected_logprobs,
    *,
    beta,
    label_smoothing=0.0,
):
    differences = log_ratio_differences(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    doubts = np.broadcast_to(label_smoothing, len(differences))
    return -mean(
        (1 - doubt) * log_sigmoid(beta * d) + doubt * log_sigmoid(-beta * d)
        for d, doubt in zip(differences, doubts, strict=True)
    )


def ipo_loss(
    chosen_logprobs,
    rejected_logprobs,
    ref_chosen_logprobs,
    ref_rejected_logprobs,
    *,
    beta,
    label_smoothing=0.0,
):
    differences = log_ratio_differences(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    doubts = np.broadcast_to(label_smoothing, len(differences))
    return mean(
        (1 - doubt) * (d - 0.5 / beta) ** 2 + doubt * (d + 0.5 / beta) ** 2
        for d, doubt in zip(differences, doubts, strict=True)
    )


def simpo_loss(chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths, *, beta, gamma):
    rows = zip(chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths, strict=True)
    return -mean(log_sigmoid(beta / nc * c - beta / nr * r - gamma) for c, r, nc, nr in rows)


def orpo_loss(chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths, *, beta):
    losses = []
    for c, r, nc, nr in zip(chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths, strict=True):
        p, q = math.exp(c / nc), math.exp(r / nr)
        log_odds_ratio = math.log((p / (1 - p)) / (q / (1 - q)))
        losses.append(-math.log(p) - beta * log_sigmoid(log_odds_ratio))
    return mean(losses)


def kto_loss(logprobs, ref_logprobs, desirable, kl, *, beta, desirable_weight, undesirable_weight):
    baseline, losses = max(float(kl), 0.0), []
    for logp, ref, good in zip(logprobs, ref_logprobs, desirable, strict=True):
        sign, weight = (1, desirable_weight) if good else (-1, undesirable_weight)
        losses.append(weight * (1 - math.exp(log_sigmoid(sign * beta * (logp - ref - baseline)))))
    return mean(losses)
