"""Says what an image classifier sees: classes and probabilities of images, and a sheet of pictures with them.

python -m tokenformer_jax.predict --workdir=W --images=photo.jpg
python -m tokenformer_jax.predict --workdir=W --images='photos/**/*.png' --top=3 --out=sheet.png
python -m tokenformer_jax.predict --workdir=W --count=24   # of the run's own validation split, whose classes are known
"""

from absl import flags

from tokenformer_jax.cli import mesh_flag, print_once, run_command, workdir_flag
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.predictions import describe, draw, find_images, predict_files, predict_split
from tokenformer_jax.files import local_path
from tokenformer_jax.storage.trained import load_trained

SHEET = 64  # images that a sheet shows at most


def main() -> None:
    workdir, mesh = workdir_flag(), mesh_flag()
    images = flags.DEFINE_string("images", None, "a file, folder or glob; by default of the run's validation split")
    count = flags.DEFINE_integer("count", 24, "without --images, how many")
    top = flags.DEFINE_integer("top", 3, "classes that are told of each, the likeliest first")
    out = flags.DEFINE_string("out", None, "file of the sheet; by default predictions.png in the workdir")
    step = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")

    def predict() -> None:
        for name, flag in (("count", count), ("top", top)):
            if flag.value < 1:
                raise UserError(f"--{name}={flag.value}: must be 1 or above")
        files = [] if images.value is None else find_images(images.value)
        run = load_trained(workdir(), step.value, mesh())
        found = predict_files(run, files, top.value) if files else predict_split(run, count.value, top.value)
        print_once(describe(found))
        sheet = local_path(out.value, "--out") if out.value else workdir() / "predictions.png"
        draw(found[:SHEET], sheet)
        more = f", the first {SHEET} of {len(found)}" if len(found) > SHEET else ""
        print_once(f"pictures: {sheet}{more}")

    run_command(predict, workdir, mesh)


if __name__ == "__main__":
    main()
