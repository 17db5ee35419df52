"""Training equals its mathematics: a model and a trainer in NumPy float64, with every gradient written out by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import erf

from tests.helpers import golden_model, random_batch, step_of, tiny_config
from tokenformer_jax.config import Config
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.training.step import make_step, put_batch

# Measured: metrics 4e-6, parameters and moments 1e-5 (see `largest_error`), where this file in float32 is off by 2e-5
# itself, and our code with every float32 made float64 by 4e-14. Slips in the optimizer, τ or gelu make 5e-4 or more.
# Not seen here: the layer norms' epsilon (the l2 norms cancel it) and one of 1e-6 in an l2 norm or the clipping.
METRICS = {"loss": 1e-5, "grad_norm": 5e-5, "learning_rate": 1e-6}
PARAMS_AND_MOMENTS = 1e-4
SOMETIMES_CLIPPED = {"optimizer__clip_norm": 0.8}  # gradient norms are 0.7 to 1.2 here

# ---- The model. Each function returns its output and its backward: cotangent of the output -> those of the inputs.


def pattention(x_BLD, keys_ND, values_NE, tau):
    scores_BLN = x_BLD @ keys_ND.T
    norm_BL1 = np.sqrt(np.sum(scores_BLN**2, axis=-1, keepdims=True))
    unit_BLN = scores_BLN / norm_BL1
    z_BLN = tau * unit_BLN
    below_BLN = (1 + erf(z_BLN / np.sqrt(2))) / 2  # the normal distribution's cdf
    weights_BLN = z_BLN * below_BLN

    def backward(dy_BLE):
        density_BLN = np.exp(-(z_BLN**2) / 2) / np.sqrt(2 * np.pi)
        dunit_BLN = tau * (dy_BLE @ values_NE.T) * (below_BLN + z_BLN * density_BLN)
        along_BL1 = np.sum(dunit_BLN * unit_BLN, axis=-1, keepdims=True)
        dscores_BLN = (dunit_BLN - along_BL1 * unit_BLN) / norm_BL1
        dkeys_ND = np.einsum("bln,bld->nd", dscores_BLN, x_BLD, optimize=True)
        dvalues_NE = np.einsum("bln,ble->ne", weights_BLN, dy_BLE, optimize=True)
        return dscores_BLN @ keys_ND, dkeys_ND, dvalues_NE

    return weights_BLN @ values_NE, backward


def layer_norm(x_BLD):
    centered_BLD = x_BLD - x_BLD.mean(-1, keepdims=True)
    deviation_BL1 = np.sqrt((centered_BLD**2).mean(-1, keepdims=True) + 1e-5)
    y_BLD = centered_BLD / deviation_BL1

    def backward(dy_BLD):
        along_BL1 = (dy_BLD * y_BLD).mean(-1, keepdims=True)
        return (dy_BLD - dy_BLD.mean(-1, keepdims=True) - y_BLD * along_BL1) / deviation_BL1

    return y_BLD, backward


def turn(x_BLHK, dims, direction=1):
    """Rotary, as a product of complex numbers; its backward is the turn in the other direction."""
    half = dims // 2
    angles_LR = np.arange(x_BLHK.shape[1])[:, None] / 10000 ** (np.arange(half) / half)
    turned = (x_BLHK[..., :half] + 1j * x_BLHK[..., half:dims]) * np.exp(1j * direction * angles_LR)[:, None]
    return np.concatenate([turned.real, turned.imag, x_BLHK[..., dims:]], axis=-1)


def attention(q_BLHK, k_BLHK, v_BLHK):
    length, scale = q_BLHK.shape[1], q_BLHK.shape[-1] ** -0.5
    scores_BHLM = scale * np.einsum("blhk,bmhk->bhlm", q_BLHK, k_BLHK)
    powers_BHLM = np.exp(scores_BHLM - scores_BHLM.max(-1, keepdims=True)) * np.tri(length)
    p_BHLM = powers_BHLM / powers_BHLM.sum(-1, keepdims=True)

    def backward(dy_BLHK):
        dp_BHLM = np.einsum("blhk,bmhk->bhlm", dy_BLHK, v_BLHK)
        dscores_BHLM = scale * p_BHLM * (dp_BHLM - (dp_BHLM * p_BHLM).sum(-1, keepdims=True))
        return (
            np.einsum("bhlm,bmhk->blhk", dscores_BHLM, k_BLHK),
            np.einsum("bhlm,blhk->bmhk", dscores_BHLM, q_BLHK),
            np.einsum("bhlm,blhk->bmhk", p_BHLM, dy_BLHK),
        )

    return np.einsum("bhlm,bmhk->blhk", p_BHLM, v_BLHK), backward


def block(x_BLD, project, heads, dims):
    """`project(name, x)` is that layer's Pattention; its backward keeps the tokens' gradients and returns x's."""
    h_BLD, norm_back = layer_norm(x_BLD)
    split = (*x_BLD.shape[:2], heads, -1)
    (q, query_back), (k, key_back), (v, value_back) = (project(name, h_BLD) for name in ("query", "key", "value"))
    mixed, attention_back = attention(turn(q.reshape(split), dims), turn(k.reshape(split), dims), v.reshape(split))
    out_BLD, out_back = project("out", mixed.reshape(x_BLD.shape))
    mid_BLD = x_BLD + out_BLD
    g_BLD, ffn_norm_back = layer_norm(mid_BLD)
    ffn_BLD, ffn_back = project("ffn", g_BLD)

    def backward(dy_BLD):
        dmid_BLD = dy_BLD + ffn_norm_back(ffn_back(dy_BLD))
        dq, dk, dv = attention_back(out_back(dmid_BLD).reshape(split))
        dq, dk, dv = (d.reshape(x_BLD.shape) for d in (turn(dq, dims, -1), turn(dk, dims, -1), dv))
        return dmid_BLD + norm_back(query_back(dq) + key_back(dk) + value_back(dv))

    return mid_BLD + ffn_BLD, backward


def logits_loss_gradients(params, tau, cfg, tokens_BL, targets_BL):
    """`params` and the gradients are flat: "blocks/ffn/keys" and the like, stacked over layers."""
    grads = {name: np.zeros_like(array) for name, array in params.items()}
    embed_VD, scale_D, bias_D = (params[name] for name in ("embed", "norm_scale", "norm_bias"))

    def projection(layer):
        def project(name, x_BLD):
            keys, values = f"blocks/{name}/keys", f"blocks/{name}/values"
            y_BLD, back = pattention(x_BLD, params[keys][layer], params[values][layer], tau[name])

            def backward(dy_BLD):
                dx_BLD, grads[keys][layer], grads[values][layer] = back(dy_BLD)
                return dx_BLD

            return y_BLD, backward

        return project

    x_BLD, backwards = embed_VD[tokens_BL], []
    for layer in range(cfg.num_layers):
        dims = int(cfg.rotary_fraction * cfg.head_dim)
        x_BLD, back = block(x_BLD, projection(layer), cfg.num_heads, dims)
        backwards.append(back)
    y_BLD, norm_back = layer_norm(x_BLD)
    h_BLD = y_BLD * scale_D + bias_D
    logits_BLV = h_BLD @ embed_VD.T

    top_BL1 = logits_BLV.max(-1, keepdims=True)
    log_p_BLV = logits_BLV - top_BL1 - np.log(np.exp(logits_BLV - top_BL1).sum(-1, keepdims=True))
    one_hot_BLV = np.eye(len(embed_VD))[targets_BL]
    loss = -(one_hot_BLV * log_p_BLV).sum() / targets_BL.size

    dlogits_BLV = (np.exp(log_p_BLV) - one_hot_BLV) / targets_BL.size
    dh_BLD = dlogits_BLV @ embed_VD
    grads["norm_scale"], grads["norm_bias"] = (dh_BLD * y_BLD).sum((0, 1)), dh_BLD.sum((0, 1))
    dx_BLD = norm_back(dh_BLD * scale_D)
    for back in reversed(backwards):
        dx_BLD = back(dx_BLD)
    grads["embed"] = np.einsum("blv,bld->vd", dlogits_BLV, h_BLD, optimize=True)
    np.add.at(grads["embed"], tokens_BL, dx_BLD)
    return logits_BLV, loss, grads


# ---- The trainer.


@dataclasses.dataclass
class Trainer:
    """Clipping by the global norm, then AdamW; τ = √N at birth."""

    cfg: Config
    params: dict
    step: int = 0
    schedule_start: int = 0

    def __post_init__(self):
        self.mu, self.nu = ({name: np.zeros_like(p) for name, p in self.params.items()} for _ in range(2))
        self.ramp, self.ramp_steps = {name: (n**0.5, n**0.5) for name, n in self.cfg.model.tokens.items()}, (0, 1)

    def learning_rate(self):
        opt, step = self.cfg.optimizer, self.step - self.schedule_start
        if step < opt.warmup_steps:
            return opt.peak_learning_rate * step / opt.warmup_steps
        done = (step - opt.warmup_steps) / (self.cfg.steps - self.schedule_start - opt.warmup_steps)
        fall = (1 + np.cos(np.pi * done)) / 2
        return opt.final_learning_rate + (opt.peak_learning_rate - opt.final_learning_rate) * fall

    def tau(self):
        return {name: np.interp(self.step, self.ramp_steps, ends) for name, ends in self.ramp.items()}

    def train(self, batch):
        opt, rate = self.cfg.optimizer, self.learning_rate()
        _, loss, grads = logits_loss_gradients(
            self.params, self.tau(), self.cfg.model, batch.tokens_BL, batch.targets_BL
        )
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        self.step += 1
        for name, p in self.params.items():
            g = grads[name] * min(1, opt.clip_norm / norm)
            self.mu[name] = opt.beta1 * self.mu[name] + (1 - opt.beta1) * g
            self.nu[name] = opt.beta2 * self.nu[name] + (1 - opt.beta2) * g**2
            mean, square = self.mu[name] / (1 - opt.beta1**self.step), self.nu[name] / (1 - opt.beta2**self.step)
            decay = 0 if name in ("norm_scale", "norm_bias") else opt.weight_decay
            self.params[name] = p - rate * (mean / (np.sqrt(square) + opt.epsilon) + decay * p)
        return {"loss": loss, "grad_norm": norm, "learning_rate": rate}

    def grow(self, cfg, new_values, ramp_steps):
        """Appends zero keys and `new_values`; the schedule starts anew, and τ goes to the new √N."""
        for name, values in new_values.items():
            for kind, tokens in (("keys", np.zeros_like(values)), ("values", values)):
                path = f"blocks/{name}/{kind}"
                for arrays, new in ((self.params, tokens), (self.mu, 0 * tokens), (self.nu, 0 * tokens)):
                    arrays[path] = np.concatenate([arrays[path], new], axis=1)
        self.ramp = {name: (n**0.5, cfg.model.tokens[name] ** 0.5) for name, n in self.cfg.model.tokens.items()}
        self.cfg, self.schedule_start, self.ramp_steps = cfg, self.step, (self.step, self.step + ramp_steps)


def flat(tree, prefix=""):
    """A nested parameter tree -> float64 arrays by path."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: np.asarray(tree, np.float64)}
    return {path: array for name, part in tree.items() for path, array in flat(part, f"{prefix}{name}/").items()}


def largest_error(tree, expected):
    """Largest error of any array, in units of that array's largest entry."""
    ours = flat(tree)
    assert ours.keys() == expected.keys()
    return max(np.abs(ours[name] - array).max() / np.abs(array).max() for name, array in expected.items())


def train_both(step, state, trainer, steps):
    """Trains our state and the NumPy trainer on the same batches, comparing all that a step gives."""
    norms = []
    for _ in range(steps):
        batch = random_batch(trainer.cfg, seed=trainer.step)
        batch = batch._replace(weights_BL=np.ones_like(batch.weights_BL))
        state, metrics = step.train(state, put_batch(step, batch))
        expected = trainer.train(batch)
        for name, rtol in METRICS.items():
            np.testing.assert_allclose(metrics[name], expected[name], rtol=rtol, err_msg=f"{name}, step {trainer.step}")
        norms.append(expected["grad_norm"])
    adam = state.opt_state[0]
    for tree, expected in ((state.params, trainer.params), (adam.mu, trainer.mu), (adam.nu, trainer.nu)):
        assert largest_error(tree, expected) < PARAMS_AND_MOMENTS
    return state, np.array(norms)


# ---- The laws.


@pytest.mark.parametrize("name", ["lm_2layer.npz", "lm_rot8.npz"])
def test_hand_written_model_is_the_authors(name):
    cfg, params, expected, raw = golden_model(name)
    tau = {name: tokens**0.5 for name, tokens in cfg.model.tokens.items()}
    logits, loss, grads = logits_loss_gradients(flat(params), tau, cfg.model, raw["tokens"], raw["labels"])
    np.testing.assert_allclose(logits, raw["logits"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(loss, raw["loss"], rtol=0, atol=1e-5)
    expected = flat(expected)
    assert grads.keys() == expected.keys()
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, expected[path], rtol=0, atol=5e-6, err_msg=path)


def test_training_is_clipped_adamw_on_the_hand_written_gradients():
    cfg = tiny_config(**SOMETIMES_CLIPPED)
    step = step_of(cfg)
    state = step.init(jax.random.key(0))
    _, norms = train_both(step, state, Trainer(cfg, flat(state.params)), steps=6)
    clipped = norms > cfg.optimizer.clip_norm
    assert np.any(clipped) and not np.all(clipped)


def test_training_on_after_growth_is_that_of_the_larger_model():
    sizes = {"model__qkv_tokens": 30, "model__ffn_tokens": 200, "steps": 12}  # "out" does not grow
    cfg, grown_cfg = (tiny_config(**SOMETIMES_CLIPPED, **more) for more in ({}, sizes))
    step = step_of(cfg)
    state = step.init(jax.random.key(0))
    trainer = Trainer(cfg, flat(state.params))
    state, _ = train_both(step, state, trainer, steps=3)

    step = make_step(grown_cfg, make_mesh(cfg.mesh), schedule_start=3)
    key, ramp_steps = jax.random.key(5), 4
    grow = jax.jit(lambda s: grow_state(s, step.abstract_state, grown_cfg.model, key, "zero_keys", ramp_steps))
    state = grow(state)
    blocks = state.params["blocks"]
    new_values = {name: np.float64(blocks[name]["values"][:, n:]) for name, n in cfg.model.tokens.items()}
    trainer.grow(grown_cfg, new_values, ramp_steps)
    train_both(step, state, trainer, steps=6)
