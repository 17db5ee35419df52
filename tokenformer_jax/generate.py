"""Samples text from a trained model, with a KV cache.

python -m tokenformer_jax.generate --workdir=W --prompt='def main(' [--temperature=0.8] [--top_p=0.95]
python -m tokenformer_jax.generate --workdir=W --prompt=… [--adapter=F] [--tokens=0.5]
"""

from absl import flags

from tokenformer_jax.cli import mesh_flag, part_flags, run_command, workdir_flag
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.sampling import Sampling, print_samples
from tokenformer_jax.storage.adapters import load_part


def main() -> None:
    workdir, mesh, parts = workdir_flag(), mesh_flag(), part_flags()
    prompt = flags.DEFINE_string("prompt", "", "text to continue")
    max_tokens = flags.DEFINE_integer("max_tokens", 128, "tokens to add at most; the end-of-text token ends it earlier")
    samples = flags.DEFINE_integer("samples", 1, "continuations to draw")
    temperature = flags.DEFINE_float("temperature", 0.8, "0 is greedy")
    top_k = flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens only; 0 from all")
    top_p = flags.DEFINE_float("top_p", 0.95, "draw from the likeliest tokens that hold this probability")
    seed = flags.DEFINE_integer("seed", 0, "of the sampling")
    step = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")

    def generate() -> None:
        how = Sampling(temperature.value, top_k.value, top_p.value)
        how.check()
        if samples.value < 1:
            raise UserError(f"--samples={samples.value}: must be 1 or above")
        if not 0 <= seed.value < 2**63:
            raise UserError(f"--seed={seed.value}: must lie between 0 and 2**63")
        run = load_part(workdir(), step.value, mesh(), **parts())
        print_samples(run, prompt.value, max_tokens.value, samples.value, how, seed.value)

    run_command(generate, workdir, mesh)


if __name__ == "__main__":
    main()
