"""What the model means: NumPy, float64, written from the paper's equations (arXiv 2405.04434).

Nothing here is fast or shares a line with the JAX code. Configs are read as plain records. Weights
are dicts of float64 arrays under DeepSeek's names, input dim first: `wq_nope` [Q, H, N] and so on.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from dsjax.config import AttentionConfig, ModelConfig, MoEConfig


def rms_norm(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    """RMSNorm over the last dim."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """The sigmoid linear unit."""
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last dim."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def swiglu(x: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray, w_down: np.ndarray) -> np.ndarray:
    """The feed-forward of a dense layer and of one expert."""
    return (silu(x @ w_gate) * (x @ w_up)) @ w_down


# Rotary embedding and YaRN (§2.1.3, §3.1.4; YaRN, arXiv 2309.00071, §3)


def mscale(factor: float, m: float) -> float:
    """YaRN's correction for a longer context, `0.1 m ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def softmax_scale(attention: AttentionConfig) -> float:
    """The factor on the scores. YaRN's correction enters twice: for queries and for keys."""
    scale = 1 / math.sqrt(attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    if attention.yarn is not None:
        scale *= mscale(attention.yarn.factor, attention.yarn.mscale_all_dim) ** 2
    return scale


def frequencies(attention: AttentionConfig) -> np.ndarray:
    """Radians per position of each pair of rotary dims."""
    d, theta, yarn = attention.qk_rope_head_dim, attention.rope_theta, attention.yarn
    plain = [1 / theta ** (2 * i / d) for i in range(d // 2)]
    if yarn is None:
        return np.array(plain)

    def pair_that_turns(rotations: float) -> float:
        # The pair i whose frequency makes so many rotations within the original length.
        return (
            d * math.log(yarn.original_length / (2 * math.pi * rotations)) / (2 * math.log(theta))
        )

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), d - 1)
    result = []
    for i, frequency in enumerate(plain):
        if i <= low:
            slowed = 0.0
        elif i >= high:
            slowed = 1.0
        else:
            slowed = (i - low) / (high - low)
        result.append(slowed * frequency / yarn.factor + (1 - slowed) * frequency)
    return np.array(result)


def rotate(x: np.ndarray, position: int, attention: AttentionConfig) -> np.ndarray:
    """Turns each pair (2i, 2i + 1) of the last dim as a complex number."""
    turn = np.exp(1j * position * frequencies(attention))
    if attention.yarn is not None:
        yarn = attention.yarn
        turn *= mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = pairs.real, pairs.imag
    return out


# Latent attention, expanded (§2.1, eq. 9 to 19, 37 to 47)


def mla(
    x: np.ndarray,
    w: dict[str, np.ndarray],
    attention: AttentionConfig,
    positions: np.ndarray,
    segments: np.ndarray,
    eps: float,
) -> np.ndarray:
    """Attention of one sequence x [T, D]; a token sees its own segment up to itself."""
    length = len(x)
    if attention.q_lora_rank is None:
        c_q = x
    else:
        c_q = rms_norm(x @ w["wq_a"], w["q_norm"], eps)
    q_nope = np.einsum("tq,qhn->thn", c_q, w["wq_nope"])
    q_rope = np.einsum("tq,qhr->thr", c_q, w["wq_rope"])
    joint = x @ w["wkv_a"]
    c_kv = rms_norm(joint[:, : attention.kv_lora_rank], w["kv_norm"], eps)
    k_rope = joint[:, attention.kv_lora_rank :]
    k_nope = np.einsum("tc,chn->thn", c_kv, w["wk_b"])
    values = np.einsum("tc,chv->thv", c_kv, w["wv_b"])
    q_rope = np.stack([rotate(q_rope[t], positions[t], attention) for t in range(length)])
    k_rope = np.stack([rotate(k_rope[t], positions[t], attention) for t in range(length)])
    out = np.zeros((length, x.shape[1]))
    for h in range(attention.num_heads):
        scores = q_nope[:, h] @ k_nope[:, h].T + q_rope[:, h] @ k_rope.T
        scores = scores * softmax_scale(attention)
        seen = np.tril(np.ones((length, length), bool)) & (segments[:, None] == segments[None])
        out += softmax(np.where(seen, scores, -np.inf)) @ values[:, h] @ w["wo"][h]
    return out


# Router (§2.2.1, §2.2.2)


def route(
    x: np.ndarray, w_router: np.ndarray, moe: MoEConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns affinities [T, E], and each token's experts and their gates [T, K], best first."""
    scores = softmax(x @ w_router)
    per_group = moe.num_experts // moe.num_groups
    indices, gates = [], []
    for s in scores:
        allowed: Sequence[int] = range(moe.num_experts)
        if moe.routing == "group_limited_greedy":
            best = [max(s[g * per_group : (g + 1) * per_group]) for g in range(moe.num_groups)]
            groups = sorted(range(moe.num_groups), key=lambda g: (-best[g], g))[: moe.top_groups]
            allowed = [e for e in range(moe.num_experts) if e // per_group in groups]
        chosen = sorted(allowed, key=lambda e: (-s[e], e))[: moe.top_k]
        gate = np.array([s[e] for e in chosen])
        gates.append(
            gate / (gate.sum() + 1e-20)
            if moe.normalize_weights and moe.top_k > 1
            else gate * moe.routed_scale
        )
        indices.append(chosen)
    return scores, np.array(indices), np.array(gates)


# Balance losses of one sequence (§2.2.3)


def expert_balance(scores: np.ndarray, indices: np.ndarray, moe: MoEConfig) -> float:
    """Equations 23 to 25, without alpha 1."""
    T, E, K = len(scores), moe.num_experts, moe.top_k
    total = 0.0
    for i in range(E):
        f_i = E / (K * T) * sum(i in chosen for chosen in indices.tolist())
        P_i = sum(scores[t, i] for t in range(T)) / T
        total += f_i * P_i
    return total


def device_balance(scores: np.ndarray, indices: np.ndarray, moe: MoEConfig) -> float:
    """Equations 26 to 28, without alpha 2."""
    T, E, K, D = len(scores), moe.num_experts, moe.top_k, moe.num_groups
    total = 0.0
    for d in range(D):
        members = range(d * E // D, (d + 1) * E // D)
        f = [E / (K * T) * sum(j in chosen for chosen in indices.tolist()) for j in members]
        P = [scores[:, j].sum() / T for j in members]
        total += sum(f) / len(members) * sum(P)
    return total


def communication_balance(scores: np.ndarray, indices: np.ndarray, moe: MoEConfig) -> float:
    """Equations 29 to 31, without alpha 3."""
    T, E, D, M = len(scores), moe.num_experts, moe.num_groups, moe.top_groups
    total = 0.0
    for d in range(D):
        members = range(d * E // D, (d + 1) * E // D)
        sent = sum(any(e in members for e in chosen) for chosen in indices.tolist())
        total += D / (M * T) * sent * sum(scores[:, j].sum() / T for j in members)
    return total


def balance_losses(
    scores: np.ndarray, indices: np.ndarray, mask: np.ndarray, moe: MoEConfig
) -> np.ndarray:
    """The three losses per sequence, averaged over the batch; padding counts nowhere.

    Args:
        scores: [B, T, E].
        indices: [B, T, K].
        mask: [B, T], False for padding.
        moe: its config.
    """
    losses = [
        [f(s[m], i[m], moe) for f in (expert_balance, device_balance, communication_balance)]
        for s, i, m in zip(scores, indices, mask, strict=True)
    ]
    return np.mean(losses, axis=0)


# Token dropping (§2.2.4)


def kept_assignments(
    scores: np.ndarray,
    indices: np.ndarray,
    mask: np.ndarray,
    exempt: Collection[int],
    moe: MoEConfig,
    capacity_factor: float,
) -> np.ndarray:
    """Returns which assignments [B, T, K] are computed: a device's best ones within its budget.

    Args:
        scores: [B, T, E].
        indices: [B, T, K].
        mask: [B, T], False for padding, which takes up no budget.
        exempt: sequences of which nothing is dropped.
        moe: its config; a device is a group of experts.
        capacity_factor: budget over an even share of all real assignments.
    """
    B, T, K = indices.shape
    per_group = moe.num_experts // moe.num_groups
    budget = int(capacity_factor * mask.sum() * K / moe.num_groups)
    kept = np.zeros((B, T, K), bool)
    for device in range(moe.num_groups):
        here = [
            (b, t, k)
            for b in range(B)
            for t in range(T)
            for k in range(K)
            if mask[b, t] and indices[b, t, k] // per_group == device
        ]
        for b, t, k in here:
            kept[b, t, k] = b in exempt
        others = [a for a in here if a[0] not in exempt]
        others.sort(key=lambda a: -scores[a[0], a[1], indices[a]])
        room = max(0, budget - (len(here) - len(others)))
        for a in others[:room]:
            kept[a] = True
    return kept


# DeepSeekMoE (eq. 20 to 22) and the whole model


def moe_layer(
    x: np.ndarray,
    w: dict[str, np.ndarray],
    moe: MoEConfig,
    gates: np.ndarray,
    indices: np.ndarray,
) -> np.ndarray:
    """Shared experts plus each token's gated experts, for x [T, D]."""
    out = np.zeros_like(x)
    if moe.num_shared_experts:
        out += swiglu(x, w["shared_gate"], w["shared_up"], w["shared_down"])
    for t, (chosen, gate) in enumerate(zip(indices, gates, strict=True)):
        for e, g in zip(chosen, gate, strict=True):
            out[t] += g * swiglu(x[t], w["w_gate"][e], w["w_up"][e], w["w_down"][e])
    return out


def forward(
    weights: dict[str, Any],
    config: ModelConfig,
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    segments: np.ndarray | None = None,
) -> tuple[np.ndarray, list[tuple[np.ndarray, ...]]]:
    """Returns logits [B, T, W], and (scores, indices) of each expert layer for the whole batch.

    Args:
        weights: "embed", "norm", "lm_head" and "layers", a list of dicts.
        config: a ModelConfig.
        tokens: [B, T].
        positions: [B, T], or None to count the row.
        segments: [B, T], 0 for padding, or None.
    """
    B, T = tokens.shape
    positions = np.tile(np.arange(T), (B, 1)) if positions is None else positions
    segments = np.ones((B, T), int) if segments is None else segments
    logits: list[np.ndarray] = []
    routed: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(config.num_layers)]
    for b in range(B):
        x = weights["embed"][tokens[b]]
        for number, w in enumerate(weights["layers"]):
            normed = rms_norm(x, w["attention_norm"], config.norm_eps)
            # The norms inside attention keep DeepSeek's default epsilon in the released code.
            x = x + mla(normed, w, config.attention, positions[b], segments[b], 1e-6)
            normed = rms_norm(x, w["feed_forward_norm"], config.norm_eps)
            if number < config.num_dense_layers:
                x = x + swiglu(normed, w["w_gate"], w["w_up"], w["w_down"])
            else:
                assert config.moe is not None
                scores, indices, gates = route(normed, w["router"], config.moe)
                routed[number].append((scores, indices))
                x = x + moe_layer(normed, w, config.moe, gates, indices)
        logits.append(rms_norm(x, weights["norm"], config.norm_eps) @ weights["lm_head"])
    stats = [tuple(map(np.stack, zip(*layer, strict=True))) for layer in routed if layer]
    return np.stack(logits), stats


def cross_entropy(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    """Mean negative log-likelihood over the tokens in the mask, in nats."""
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((log_z - chosen) * mask).sum() / mask.sum()
