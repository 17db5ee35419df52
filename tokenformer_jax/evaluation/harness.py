"""A trained model as lm-evaluation-harness knows one, by the name `tokenformer`. Needs the extra `eval`.

Each process is given all requests, and the mesh shares them out: to the harness there is one process.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from tokenformer_jax.config import suggest
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.sampling import Sampling
from tokenformer_jax.evaluation.scoring import Prompt, Scored, Scorer
from tokenformer_jax.files import run_path
from tokenformer_jax.storage.trained import load_trained

MOST_TOKENS = 256  # of an answer, where a task does not say
_IGNORED = {"until", "max_gen_toks", "do_sample"}  # of a request's settings, read by name


@register_model("tokenformer")
class HarnessModel(LM):
    """What the harness asks of a model, by a `Scorer`."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer, self.tokenizer = scorer, None  # the harness takes an attribute `tokenizer` for transformers'
        self._tokens = scorer.run.tokenizer

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "HarnessModel":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "HarnessModel":
        """For the harness' own command: `--model_args workdir=W,step=N --batch_size 16`."""
        known = ("workdir", "step")
        for name in arg_dict:
            if name not in known:
                raise UserError(f"--model_args {name}=…: unknown{suggest(name, known)}; use workdir=W, and step=N")
        if "workdir" not in arg_dict:
            raise UserError("--model_args: names no run; use --model_args workdir=W")
        size = str((additional_config or {}).get("batch_size") or "auto")
        if size != "auto" and not size.isdecimal():
            raise UserError(f"--batch_size {size}: must be a number, or auto for the run's own")
        run = load_trained(run_path(str(arg_dict["workdir"]), "--model_args workdir"), arg_dict.get("step"))
        return cls(Scorer(run, 0 if size == "auto" else int(size)))

    @property
    def eot_token_id(self) -> int:
        return self._tokens.end_of_text

    @property
    def max_length(self) -> int:
        return self.scorer.context_length

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the harness' own command writes of the model."""
        run = self.scorer.run
        return {
            "model_num_parameters": run.num_params,
            "model_dtype": run.cfg.model.dtype,
            "model_sha": run.fingerprint,
            "step": run.step_number,
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuses the answers of another model: the harness finds answers by their requests alone."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            mine = {"model": self.scorer.run.fingerprint, "max_length": self.max_length}
            if cache_hook.dbdict.setdefault("tokenformer", mine) != mine:
                raise UserError("--use_cache: holds the answers of another model or step; use a path of its own")

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        answers = [(total, is_greedy) for total, is_greedy in self.scorer.score(self._encode_pairs(pairs))]
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """The ids of contexts and continuations, encoded together and cut where the context alone would end.

        As in the harness, space at a context's end goes to the continuation. Where a token spans both, so that nothing
        would be left to predict, it and what follows are the continuation. End-of-text precedes an empty context.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        before = self._tokens.encode_batch(contexts)
        whole = self._tokens.encode_batch([context + continuation for context, continuation in pairs])
        scored = []
        for (_, continuation), context, ids in zip(pairs, before, whole, strict=True):
            rest = ids[len(context) :]
            if continuation and not rest:
                same = [a == b for a, b in zip(context, ids, strict=False)]
                shared = min([*same, False].index(False), len(ids) - 1)
                context, rest = ids[:shared], ids[shared:]
            scored.append(Scored([*(context or [self.eot_token_id]), *rest], len(rest) if continuation else 0))
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows, owners = [], []
        for number, ids in enumerate(self._tokens.encode_batch(texts)):
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1):
                context, predicted = make_disjoint_window(window)
                windows.append(Scored([*context, *predicted], len(predicted)))
                owners.append(number)
        totals = [0.0] * len(texts)
        for number, score in zip(owners, self.scorer.score(windows), strict=True):
            totals[number] += score.log_likelihood
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        stops, prompts = [], []
        encoded = self._tokens.encode_batch([request.args[0] for request in requests])
        for ids, request in zip(encoded, requests, strict=True):
            settings = normalize_gen_kwargs(request.args[1], MOST_TOKENS)
            stops.append([stop for stop in settings["until"] if stop])
            prompts.append(self._prompt(ids, settings))

        def is_done(number: int, ids: list[int]) -> bool:
            return bool(stops[number]) and any(stop in self._tokens.decode(ids) for stop in stops[number])

        answers = []
        found = self.scorer.generate(prompts, self.eot_token_id, is_done)
        for request, prompt, stop, ids in zip(requests, prompts, stops, found, strict=True):
            text = self._tokens.continuation(prompt.ids, ids)
            answers.append(postprocess_generated_text(text, stop, None))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _prompt(self, ids: list[int], settings: dict[str, Any]) -> Prompt:
        """A prompt's last ids, so that it and the answer fit into the context, and how the answer is drawn."""
        unknown = set(settings) - _IGNORED - {"temperature", "top_k", "top_p"}
        if unknown:
            raise UserError(f"generation_kwargs: {min(unknown)} is not known here; use temperature, top_k and top_p")
        most = settings["max_gen_toks"]
        if most >= self.max_length:
            most = self.max_length // 2
        how = Sampling(0.0)
        if settings["do_sample"]:
            how = Sampling(settings["temperature"], settings.get("top_k", 0), settings.get("top_p", 1.0))
            how.check()
        return Prompt(ids[most - self.max_length :] or [self.eot_token_id], most, how)
