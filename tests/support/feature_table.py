"""The README's table of what works with compression and what is refused, from the tests.

A test that proves a row carries ``@pytest.mark.feature(row, status)``. Rows without such a test
do not exist, and ``test_readme.py`` compares the table with the README.

    python tests/support/feature_table.py      writes it into the README
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
README = TESTS.parent / "README.md"
ANCHOR = "<!-- features -->\n\n"
WORKS, REFUSED, UNTESTED = "works", "refused", "not yet run on a GPU"
STATUSES = (WORKS, REFUSED, UNTESTED)

NOTES = {
    "Prefix caching": "hits are exact, also on blocks of compressed requests; protected prompt "
    "blocks stay shared; reset, eviction and KV events agree with the pool",
    "Chunked prefill": "64k tokens in a pool of a sixth of that; mixed batches, chunks of 64 to "
    "8192 tokens",
    "Async scheduling": "two steps in flight, 112 requests at once",
    "CUDA": "refused unless `TRIATTENTION_ALLOW_UNTESTED_VLLM=1`",
    "CUDA graphs": "metadata is written into persistent buffers at every step",
    "Model runner V2": "its own code passes the engine tests on a CPU, under Triton's "
    "interpreter; refused before vLLM 0.30",
    "Tensor parallel": "each rank scores its own heads; `union` is refused",
    "Pipeline parallel": "the layer mean of `per_head` is taken per stage; `per_layer_per_head` is "
    "that of one rank; `union` is refused",
    "Tensor x pipeline parallel": "four ranks, multiprocess executor",
    "Data parallel": "each rank compresses for itself",
    "Ray executor": "use `--distributed-executor-backend mp`",
    "Speculative decoding": "ngram, draft model, EAGLE, EAGLE3, MTP; drafts and rejected tokens "
    "are never candidates; refused with vLLM 0.30 on a CPU, which fails at drafts by itself",
    "fp8 KV": "scored and moved as it is stored",
    "Sliding-window layers": "left as they are beside full-attention layers, which are compressed",
    "Linear-attention layers": "likewise; states and prefix hits are exact",
    "max_model_len beyond the pool": "a request needs a bounded number of blocks",
    "Preemption and resume": "a resumed request is compressed again",
    "Priority scheduling": "",
    "Aborted requests": "",
    "Parallel sampling (n)": "",
    "Beam search": "each beam is a new request at every token",
    "Stop strings": "",
    "Structured output": "",
    "logprobs, prompt_logprobs": "",
    "LoRA": "statistics are those of the base model",
    "Metrics": "on the server's `/metrics`, over several API servers too",
    "vLLM 0.28 to 0.32": "the whole suite passed on 0.32, what a release can change on 0.28 to "
    "0.31; other versions are refused unless "
    "`TRIATTENTION_ALLOW_UNTESTED_VLLM=1`",
    "Pooling models": "without compression they are served as ever",
    "Context parallel": "decode or prefill, above 1",
    "KV connectors": "they load and save blocks by position",
    "Images and video with M-RoPE": "text is compressed; a prompt with images is answered with 400 "
    "unless it is short or asks for `kv_compression` off",
    "Elastic expert parallel": "",
    "Rust frontend": "it has neither our checks of requests nor our metrics",
    "Multi-head latent attention": "",
    "Encoder-decoder, cross-attention": "",
    "Bidirectional attention": "prefix LMs, encoder layers",
    "ALiBi": "",
    "KV sharing across layers": "",
    "Quantised KV that cannot be read": "4-bit types; on the CPU also those with a scale per token "
    "and head",
    "Micro-batching (DBO)": "",
    "A custom scheduler or worker class": "compression brings its own",
    "Models without full attention": "",
}
"""Row -> what there is to say about it, in the README's order."""


@dataclass(frozen=True)
class Proof:
    """One marker. test: name of the function that carries it, or of the table of cases in which it
    stands."""

    feature: str
    status: str
    path: Path
    test: str


def proofs() -> Iterator[Proof]:
    """Every marker in the tests."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            name = node.name if isinstance(node, ast.FunctionDef) else ast.unparse(node)[:40]
            for part in ast.walk(node):
                if isinstance(part, ast.Call) and ast.unparse(part.func) == "pytest.mark.feature":
                    feature, status = (ast.literal_eval(argument) for argument in part.args)
                    yield Proof(feature, status, path, name)


def markdown_table(found: list[Proof]) -> str:
    """One row per feature that a test proves; raises ValueError for a marker that is not known
    here, or for two tests that say different things."""
    statuses: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    for proof in found:
        if proof.feature not in NOTES or proof.status not in STATUSES:
            raise ValueError(
                f"{proof.path.name}, {proof.test}: the marker ({proof.feature!r}, "
                f"{proof.status!r}) is not known; rows are {list(NOTES)}, statuses {STATUSES}"
            )
        statuses.setdefault(proof.feature, set()).add(proof.status)
        files.setdefault(proof.feature, set()).add(proof.path.relative_to(TESTS.parent).as_posix())
    several = {feature: said for feature, said in statuses.items() if len(said) > 1}
    if several:
        raise ValueError(f"tests disagree about {several}")
    rows = ["| feature | today | | proved by |", "| --- | --- | --- | --- |"]
    for feature in filter(statuses.__contains__, NOTES):
        (status,) = statuses[feature]
        links = ", ".join(f"[{subject(file)}]({file})" for file in sorted(files[feature]))
        rows.append(f"| {feature} | {status} | {NOTES[feature]} | {links} |")
    return "\n".join(rows)


def subject(file: str) -> str:
    """What the tests of a file are about, from its name."""
    return Path(file).stem.removeprefix("test_").replace("_", " ")


def with_table(readme: str, table: str) -> str:
    """The README with ``table`` in the place of the one behind its anchor."""
    before, _, after = readme.partition(ANCHOR)
    return before + ANCHOR + table + after[after.index("\n\n") :]


if __name__ == "__main__":
    README.write_text(
        with_table(README.read_text(encoding="utf-8"), markdown_table(list(proofs())))
    )
