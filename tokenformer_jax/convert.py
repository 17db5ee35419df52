"""Published weights in and out: the authors' files and the Hugging Face hub's repositories <-> a workdir of ours.

python -m tokenformer_jax.convert --from_hub=Haiyang-W/TokenFormer-450M --workdir=W   # or a folder as one there
python -m tokenformer_jax.convert --to_hub_format=FOLDER --workdir=W [--step=N]   # for transformers, with its code
python -m tokenformer_jax.convert --from_torch=FILE --workdir=W --config=pile:150m [--tokenizer=T]   # or --num_heads=12
python -m tokenformer_jax.convert --to_torch=FILE --workdir=W [--step=N]   # or --to_adapter=F.safetensors

FILE ends in .bin, .pt or .pth (which need torch), .safetensors or .npz. Tensors are read, stored code is never run.
"""

from absl import flags

from tokenformer_jax.cli import config_or_flags, print_once, run_command, workdir_flag
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import local_path
from tokenformer_jax.storage.adapters import export_adapter, in_evaluate
from tokenformer_jax.storage.hub import UNSAID, import_published, read_for
from tokenformer_jax.storage.hub_format import export_hub, in_transformers
from tokenformer_jax.storage.official import export_official, in_pytorch

READ = {"from_torch": "the official state dict to read", "from_hub": "the OWNER/NAME[@REVISION], or a folder like one"}
WRITE = {
    "to_torch": ("the official state dict to write", export_official, in_pytorch),
    "to_hub_format": ("the new folder to write, for transformers", export_hub, in_transformers),
    "to_adapter": ("the file to write, of the new tokens of grow --train=new", export_adapter, in_evaluate),
}


def main() -> None:
    workdir = workdir_flag()
    texts = READ | {name: text for name, (text, *_) in WRITE.items()}
    ways = [flags.DEFINE_string(name, None, text) for name, text in texts.items()]
    step = flags.DEFINE_integer("step", None, "which checkpoint to write; by default the newest")
    tokenizer = flags.DEFINE_string("tokenizer", None, "the model's tokenizer.json; overrides config.data.tokenizer")
    for name, text in {"num_heads": "attention heads", "context_length": "tokens of context"}.items():
        flags.DEFINE_integer(name, None, f"{text}, where neither --config nor what is read says it")
    flags.DEFINE_float("rotary_fraction", None, "part of each head's dims that rotary turns, likewise; 0.25 if unsaid")
    config = config_or_flags(*UNSAID)

    def convert() -> None:
        given = {way.name: way.value for way in ways if way.value}
        if len(given) != 1:
            raise UserError(f"{', '.join(f'--{way.name}' for way in ways)}: give one of them, to read or to write")
        [(way, name)] = given.items()
        local_path(tokenizer.value or "", "--tokenizer")
        if way in WRITE:
            (_, export, use), path = WRITE[way], local_path(name, f"--{way}")
            number, count = export(workdir(), path, step.value)
            return print_once(f"{path}: step {number} of {workdir()}, {count:,} parameters{use(path, workdir())}")
        if step.value is not None:
            raise UserError(f"--step={step.value}: an imported model starts at step 0; leave it out")
        found = read_for(workdir(), way, name)
        cfg = config(found.source, found.config, found.known)
        print_once(import_published(found, cfg, workdir(), tokenizer.value))

    run_command(convert, workdir)


if __name__ == "__main__":
    main()
