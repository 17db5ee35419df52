"""The order of rooms and of the files in each: every file imports only from those before it."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1] / "tokenformer_jax"
# A line is a floor: a file of its own, or a room and its files. Presets use no other room, and the commands use any.
FLOORS = """
    errors
    environment
    buckets
    files
    rules
    image_config
    config
    configs: base quickstart pile ladder released tpu transformer zero_shot digits imagenet
    devices: distributed progress hardware sharding
    data: tokenizer units readers folders text published encode workers shards tokens mixture batches
    data: augment pictures images image_batches
    nn: backends layers row_kernels pattention_vjp pattention watch attention transformer loss language vision
    training: profiler nested language images tasks state schedule learned non_finite step
    storage: fingerprint workdir in_bucket record arrays trackers metrics_file checkpoints trained adapters
    storage: state_dicts official hub card hub_format
    evaluation: perplexity contributions inspection sampling report slope advice settings
    evaluation: scoring harness zero_shot suite predictions
    growth: recipes ladder figures verify resize grow shrink positions
    planning: hlo plan fit whole_run
    running: signals run log loop branch
    any_tokenformer
    api
    classifier
    pytorch
    modeling_tokenformer
    cli
"""
COMMANDS = "train grow evaluate generate predict convert plan report inspect checkpoint prepare lm_eval".split()


def order() -> list[str]:
    """Modules below the package's face and commands, by their dotted names."""
    names = []
    for line in FLOORS.split("\n"):
        room, _, files = line.strip().partition(":")
        names += [f"{room}.{file}" for file in files.split()] or [room] * bool(room)
    return names


def path_of(module: str) -> pathlib.Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def imports(module: str) -> set[str]:
    """The project's modules that a module imports, however it says so."""
    names = []
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    ours = {name.removeprefix("tokenformer_jax.") for name in names if name.startswith("tokenformer_jax.")}
    return {name for name in ours if path_of(name).exists()}


def test_every_module_stands_in_the_order():
    found = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")]
    assert sorted([*order(), *COMMANDS]) == sorted(name for name in found if not name.endswith("__init__"))


def test_modules_import_only_from_below():
    for position, module in enumerate(order()):
        assert imports(module) <= set(order()[:position]), module


def test_no_command_is_imported():
    for command in COMMANDS:
        assert imports(command) <= set(order()), command


def test_files_are_short_and_commands_fit_on_a_screen():
    for path in ROOT.rglob("*.py"):
        most = 60 if path.parent == ROOT and path.stem in COMMANDS else 400
        assert len(path.read_text().splitlines()) <= most, path


def test_the_pytorch_model_may_be_copied():
    assert not imports("pytorch") and "jax" not in path_of("pytorch").read_text().split('"""', 2)[2]


def test_storage_and_data_know_no_model():
    for module in ("storage.checkpoints", "storage.metrics_file", "data.tokens", "data.batches", "data.tokenizer"):
        assert not any(name.startswith(("nn.", "training.")) for name in imports(module)), module


def test_models_are_known_by_their_task_alone():
    language = {"nn.language", "training.language", "data.tokens", "data.tokenizer", "data.text"}
    general = [name for name in order() if name.startswith(("running.", "planning."))]
    general += ["training.state", "training.step", "storage.checkpoints", "storage.record"]
    for module in [*general, "growth.resize", "growth.verify", "growth.shrink", "growth.ladder"]:
        assert not imports(module) & language, module


def test_nothing_unpickles_or_evaluates():
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        for word in ("pickle", "eval(", "exec(", "allow_pickle=True", "yaml"):
            assert word not in text, f"{path.name}: {word}"
