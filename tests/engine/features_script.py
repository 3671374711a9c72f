"""Features that users leave on, in an engine without compression and in one with it.

Both engines live in one process, one after the other; ``test_features.py`` judges what they did.
"""

from collections.abc import Iterable
from typing import Any

from cache_traffic import cache_traffic, conversation, pool_traffic
from observed_engine import Observer, start_engine, statistics_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams


class Engine:
    """An observed engine, the requests sent to it, and what became of them."""

    def __init__(self, job: dict[str, Any], settings: dict[str, Any] | None) -> None:
        self.llm = start_engine(
            job["model"],
            settings,
            max_model_len=2048,
            max_num_batched_tokens=64,
            max_num_seqs=16,
            scheduling_policy="priority",
            enable_lora=True,
            max_loras=2,
            max_lora_rank=8,
            structured_outputs_config={"backend": "xgrammar"},
            kv_events_config={
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": job["events"],
            },
        )
        self.observer = Observer(self.llm)
        self.sampling = {"temperature": 1.0, "seed": 3, **job["sampling"]}
        adapters = enumerate(job["adapters"], start=1)
        self.adapters = [LoRARequest(f"adapter {i}", i, path) for i, path in adapters]

    @staticmethod
    def greedy(num_tokens: int, **sampling: Any) -> SamplingParams:
        """Parameters of one request; ``sampling`` overrules."""
        chosen = {"temperature": 0.0, "ignore_eos": True, "logprobs": 20, **sampling}
        return SamplingParams(max_tokens=num_tokens, **chosen)

    def generate(self, prompts: Iterable[list[int]], num_tokens: int, **sampling: Any) -> Any:
        """Greedy answers of exactly so many tokens unless ``sampling`` says otherwise."""
        loras = sampling.pop("loras", None)
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            self.greedy(num_tokens, **sampling),
            use_tqdm=False,
            lora_request=loras,
        )

    def features(self, prompt: list[int], long_prompt: list[int], length: int) -> dict[str, Any]:
        """One feature after the other, over answers of ``length`` tokens."""
        answers: dict[str, Any] = {}
        observed: dict[str, Any] = {}

        def note(name: str, outputs: Any) -> None:
            answers[name] = [
                (answer.text, list(answer.token_ids), answer.finish_reason, answer.stop_reason)
                for output in outputs
                for answer in output.outputs
            ]
            observed[name] = self.observer.take()

        note("sampling", self.generate([prompt], length, **self.sampling))
        text = answers["sampling"][0][0]
        note("n", self.generate([prompt], length, n=3, temperature=1.0, seed=7))
        note("prompt_logprobs", self.generate([long_prompt], 8, prompt_logprobs=5))
        # A token has one letter or two.
        grammar = StructuredOutputsParams(regex=f"[a-f ]{{{length * 3 // 2}}}[0-9]{{3}}")
        sampling = {"structured_outputs": grammar, "ignore_eos": False}
        note("structured", self.generate([prompt], 2 * length, **sampling))
        stop = late_part(text)
        note("stop", self.generate([prompt], length, stop=[stop], **self.sampling))
        note("lora", self.generate([prompt] * 2, length, loras=self.adapters))
        beams = self.llm.beam_search(
            [{"prompt_token_ids": long_prompt}],
            BeamSearchParams(beam_width=3, max_tokens=3, ignore_eos=True),
        )
        answers["beam"] = [(beam.tokens, beam.cum_logprob) for beam in beams[0].sequences]
        observed["beam"] = self.observer.take()
        return {"answers": answers, "observed": observed, "stop": stop}


def late_part(text: str) -> str:
    """Some letters that a text has in its last third and not before."""
    for start in range(len(text) * 2 // 3, len(text) - 12):
        if text.index(text[start : start + 5]) == start and text[start : start + 5].isalpha():
            return text[start : start + 5]
    raise AssertionError(f"nothing new in the end of {text!r}")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Short answers and a conversation on both sides, then everything on the compressing one."""
    plain = Engine(job, None)
    result = {"plain": plain.features(**job["short"]), "plain_turns": conversation(plain, job)}
    del plain
    ours = Engine(job, job["settings"])
    result |= {
        "ours": ours.features(**job["short"]),
        "long": ours.features(**job["long"]),
        "turns": conversation(ours, job),
        "cache": cache_traffic(ours, job),
        "pool": pool_traffic(ours, job),
        "statistics": statistics_file(ours.llm),
        "num_held": ours.observer.num_held,
    }
    return result
