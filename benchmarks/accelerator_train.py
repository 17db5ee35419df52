"""The contenders of `accelerator_step`: processes that train, and are told when."""

import resource
import time
import traceback
from typing import Any

from benchmarks.accelerator_work import Figures, Talk, config, is_no_memory, peak_bytes


def train_jax(talk: Talk, size: str, projection: str, batch: int, overrides: Figures) -> None:
    """Our step. It is compiled before its state takes memory; then comes "start", "steps" and "finish"."""
    import jax
    import jax.numpy as jnp

    from benchmarks.step_time import random_batch
    from tokenformer_jax.devices.sharding import make_mesh
    from tokenformer_jax.nn.layers import count_params
    from tokenformer_jax.training.language import train_flops_per_token
    from tokenformer_jax.training.step import make_step, put_batch
    from tokenformer_jax.training.tasks import task_of

    cfg = config(size, projection, batch, overrides)
    imported = time.monotonic() - talk.began
    jax.block_until_ready(jnp.zeros(8))
    step = make_step(cfg, make_mesh(cfg.mesh))
    abstract_batch = task_of(cfg).abstract_batch(cfg, step.batch)
    began = time.perf_counter()
    program = step.train.lower(step.abstract_state, abstract_batch).compile()
    compiled = time.perf_counter() - began
    sizes = program.memory_analysis()
    talk.reply(
        batch=batch,
        tokens=batch * cfg.model.context_length,
        params=count_params(step.abstract_state.params),
        flops_per_token=train_flops_per_token(cfg.model),
        import_seconds=imported,
        compile_seconds=compiled,
        compiler_bytes=sizes and int(sizes.argument_size_in_bytes + sizes.temp_size_in_bytes),
        remat=cfg.model.remat,
    )
    for command in talk.commands():
        if command["do"] == "start":
            began = time.perf_counter()
            state = step.init(jax.random.key(0))
            data = put_batch(step, random_batch(cfg))
            state, metrics = program(state, data)
            loss = float(metrics["loss"])
            talk.reply(start_seconds=time.perf_counter() - began, first_loss=loss)
        elif command["do"] == "steps":
            for _ in range(2):
                state, metrics = program(state, data)
            jax.block_until_ready(metrics)
            began = time.perf_counter()
            for _ in range(command["count"]):
                state, metrics = program(state, data)
            jax.block_until_ready((state, metrics))
            talk.reply(seconds=(time.perf_counter() - began) / command["count"], loss=float(metrics["loss"]))
        else:
            talk.reply(peak_bytes=peak_bytes())
            return


def train_torch(talk: Talk, size: str, batch: int, overrides: Figures) -> None:
    """PyTorch's step, set up for speed on one GPU; on a CPU without torch.compile, which would take minutes."""
    import numpy as np
    import torch

    from benchmarks import torch_tokenformer
    from benchmarks.step_time import random_batch
    from tokenformer_jax.training.language import train_flops_per_token

    cfg = config(size, "pattention", batch, overrides)
    on_gpu = torch.cuda.is_available()
    where = torch.device("cuda" if on_gpu else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    imported = time.monotonic() - talk.began
    with where:
        model = torch_tokenformer.TokenFormer(cfg.model)
    adamw = torch_tokenformer.optimizer(model, cfg.optimizer.peak_learning_rate)
    data = random_batch(cfg)
    tokens, targets = (torch.from_numpy(x.astype(np.int64)).to(where) for x in (data.tokens_BL, data.targets_BL))
    loss_of: Any = torch.compile(model.loss) if on_gpu else model.loss

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def step() -> Any:
        def loss(tokens: Any, targets: Any) -> Any:
            with torch.autocast(where.type, torch.bfloat16):
                return loss_of(tokens, targets)

        return torch_tokenformer.train_step(model, adamw, tokens, targets, loss)

    began = time.perf_counter()
    trouble = None
    try:
        first = float(step())
    except Exception as error:
        if is_no_memory(error) or not on_gpu:
            raise
        traceback.print_exc()
        trouble, loss_of = f"{type(error).__name__}: {error}"[:400], model.loss
        adamw.zero_grad(set_to_none=True)
        first = float(step())
    wait()
    talk.reply(
        batch=batch,
        tokens=batch * cfg.model.context_length,
        params=sum(p.numel() for p in model.parameters()),
        flops_per_token=train_flops_per_token(cfg.model),
        import_seconds=imported,
        compile_seconds=time.perf_counter() - began,
        compiled=on_gpu and trouble is None,
        compile_error=trouble,
        torch=torch.__version__,
    )
    for command in talk.commands():
        if command["do"] == "start":
            began = time.perf_counter()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            float(step())
            talk.reply(start_seconds=time.perf_counter() - began, first_loss=first)
        elif command["do"] == "steps":
            for _ in range(2):
                step()
            wait()
            began = time.perf_counter()
            for _ in range(command["count"]):
                loss = step()
            wait()
            talk.reply(seconds=(time.perf_counter() - began) / command["count"], loss=float(loss))
        else:
            held = torch.cuda.max_memory_allocated() if on_gpu else 0
            talk.reply(peak_bytes=held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            return
