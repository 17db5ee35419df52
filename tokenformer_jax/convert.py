"""Official PyTorch weights in and out: the authors' `pytorch_model.bin` <-> a workdir of ours.

python -m tokenformer_jax.convert --from_torch=FILE --workdir=W --config=pile:150m
python -m tokenformer_jax.convert --from_torch=FILE --workdir=W --num_heads=12 --context_length=2048 [--tokenizer=T]
python -m tokenformer_jax.convert --to_torch=FILE --workdir=W [--step=N]

FILE ends in .bin, .pt or .pth (which need torch), .safetensors or .npz. Tensors are read, stored code is never run.
"""

import dataclasses

from absl import flags

from tokenformer_jax.cli import config_or_flags, print_once, run_command, workdir_flag
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import local_path
from tokenformer_jax.storage.official import config_of, export_official, import_official, in_pytorch
from tokenformer_jax.storage.state_dicts import read_state_dict


def main() -> None:
    workdir = workdir_flag()
    from_torch = flags.DEFINE_string("from_torch", None, "the official state dict to read")
    to_torch = flags.DEFINE_string("to_torch", None, "the official state dict to write")
    step = flags.DEFINE_integer("step", None, "which checkpoint to write; by default the newest")
    tokenizer = flags.DEFINE_string("tokenizer", None, "the model's tokenizer.json; overrides config.data.tokenizer")
    flags.DEFINE_integer("num_heads", None, "attention heads, where no --config says it")
    flags.DEFINE_integer("context_length", None, "tokens of context, where no --config says it")
    flags.DEFINE_float("rotary_fraction", 0.25, "part of each head's dims that rotary turns, likewise")
    config = config_or_flags("num_heads", "context_length", "rotary_fraction")

    def convert() -> None:
        if bool(from_torch.value) == bool(to_torch.value):
            raise UserError("--from_torch or --to_torch: give one of them, the file to read or the file to write")
        given = "--from_torch" if from_torch.value else "--to_torch"
        path = local_path(from_torch.value or to_torch.value or "", given)
        local_path(tokenizer.value or "", "--tokenizer")
        if to_torch.value:
            number, count = export_official(workdir(), path, step.value)
            done = f"{path}: step {number} of {workdir()}, {count:,} parameters under the official names"
            done += in_pytorch(path, workdir())
        else:
            if step.value is not None:
                raise UserError(f"--step={step.value}: an imported model starts at step 0; leave it out")
            arrays = read_state_dict(path)
            cfg = config(str(path), lambda said: config_of(arrays, said, str(path)))
            file = tokenizer.value or cfg.data.tokenizer
            cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=file))
            count = import_official(arrays, cfg, workdir(), str(path))
            done = f"{workdir()}: {count:,} parameters of {path} at step 0; train, grow, evaluate and generate take it"
            if not file:
                note = "a new one was trained: its ids are not those of the model"
                done += f"\nwarning: no --tokenizer was given and {note}"
        print_once(done)

    run_command(convert, workdir)


if __name__ == "__main__":
    main()
