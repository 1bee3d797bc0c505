"""From a checkpoint to text in ONNX Runtime: ``build``, ``export``, ``run``, ``validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hsa_compile.cli.common import (
    Bundle,
    Checkpoint,
    Data,
    Output,
    Seed,
    console,
    fail,
    friendly,
    spinner,
)

TargetNames = Annotated[
    list[str] | None,
    typer.Option("--target", "-t", help="cpu:native (default), a level such as cpu:x86-64-v3, cuda:sm_90a; repeat."),
]
ProviderName = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="What ONNX Runtime runs on; auto: a GPU where there is one and the bundle has kernels for GPUs."),
]
AnyTargetName = Annotated[str, typer.Option("--target", "-t", help="A CPU level as for export, or cuda:sm_90a.")]


def build(
    model: Annotated[str, typer.Argument(help="A checkpoint, or a preset such as tiny.")] = "tiny",
    target: AnyTargetName = "cpu:native",
    training: Annotated[bool, typer.Option(help="Also the backward passes.")] = True,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Of the tensors. Default: float32 on CPUs, bfloat16 on GPUs."),
    ] = None,
) -> None:
    """Compile the kernels that a model needs; they are kept and found again.

    GPU targets such as cuda:sm_90a need nvcc and TileLang, but no GPU.
    """
    with friendly():
        from rich.table import Table

        from hsa_compile.kernels import build_all
        from hsa_compile.tuning import config_of

        config = config_of(model)
        table = Table("operator", "pass", "target", "library")
        with spinner("compiling") as say:
            for artifact in build_all(config, training, target, dtype, every_length=True):
                say(f"{artifact.problem.op} {artifact.pass_name} is done")
                table.add_row(artifact.problem.op, artifact.pass_name, artifact.target, str(artifact.library))
        console.print(table)


def export(
    checkpoint: Checkpoint,
    output: Output = Path("runs/bundle"),
    target: TargetNames = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of weights and state; bfloat16 runs on GPUs.")
    ] = "float32",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Hugging Face tokenizer.json. Default: the checkpoint's, or bytes.")
    ] = None,
    end_tokens: Annotated[
        list[str] | None, typer.Option("--end-token", help="A token that ends a text, such as </s>; may be repeated.")
    ] = None,
) -> None:
    """Write a bundle: ONNX graph, operator library, tokenizer, for machines without PyTorch or a compiler."""
    with friendly():
        import torch

        from hsa_compile.export import export_bundle
        from hsa_compile.kernels import exported
        from hsa_compile.model.checkpoint import load_checkpoint
        from hsa_compile.model.train import TOKENIZER_NAME
        from hsa_compile.schedules.target import resolve_any

        targets = target or ["cpu:native"]
        for name in targets:
            resolve_any(name)  # other names are refused before any work
        with spinner("exporting") as say:
            model = load_checkpoint(checkpoint).eval().to(getattr(torch, dtype))
            say("kernels")
            kernels = exported(model.config, targets, dtype)
            say("graph")
            if tokenizer is None and (checkpoint / TOKENIZER_NAME).is_file():
                tokenizer = checkpoint / TOKENIZER_NAME
            export_bundle(model, output, kernels, tokenizer, end_tokens or ())
        console.print(f"bundle {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def run(
    bundle: Bundle,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens of this probability.")] = 1.0,
    seed: Seed = 0,
    provider: ProviderName = "auto",
    fused: Annotated[bool, typer.Option(help="The bundle's kernels, or the graph's function bodies.")] = True,
) -> None:
    """Stream text from a bundle in ONNX Runtime."""
    with friendly():
        from hsa_compile.export import Session, load_tokenizer

        session = Session(bundle, provider=provider, fused=fused)
        tokenizer = load_tokenizer(bundle, session.manifest)
        ids = tokenizer.encode(prompt)
        if not ids:
            fail("the prompt is empty; give at least one character")
        decoder, ends = tokenizer.stream(), list(tokenizer.end_ids)
        try:
            tokens = session.generate(
                ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop_ids=ends
            )
        except ValueError as error:
            fail(str(error))
        console.print(prompt, end="", style="dim", highlight=False, markup=False)
        for token in tokens:
            print(decoder.push([token]), end="", flush=True)
        print(decoder.finish())


def serve(
    bundle: Bundle,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and says which.")] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="Texts at a time; they decode together.")] = 8,
    context: Annotated[int, typer.Option(help="Most tokens of a prompt and its answer together.")] = 65_536,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens a request may ask for.")] = 4096,
    queue: Annotated[int, typer.Option(help="Requests that may wait for a row; further ones get status 429.")] = 64,
    body_bytes: Annotated[int, typer.Option(help="Most bytes of a request's body.")] = 4 << 20,
    seconds: Annotated[float, typer.Option(help="Most seconds from a request to the end of its answer.")] = 600.0,
    name: Annotated[str | None, typer.Option(help="Of the model, for clients. Default: the bundle's folder.")] = None,
    provider: ProviderName = "auto",
    fused: Annotated[bool, typer.Option(help="The bundle's kernels, or the graph's function bodies.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime. Default: it chooses.")] = None,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's completions: /v1/completions, /v1/models, /healthz, /metrics.

    Any client of OpenAI's completions works with base_url http://HOST:PORT/v1, and so does curl:

    \b
    curl localhost:8000/v1/completions -d '{"prompt": "In the beginning", "max_tokens": 50, "stream": true}'

    Requests may have: prompt (text or token ids), max_tokens (16 by default), temperature (1), top_p, seed, stop (up to
    four strings), echo, stream, stream_options. A client that disconnects frees its row at once. Ctrl-C or SIGTERM lets
    running answers end, for 30 seconds. There is no authentication: put a proxy before it where others can reach it.
    """
    with friendly():
        import logging

        from hsa_compile.serve.app import Limits
        from hsa_compile.serve.server import bundle_service
        from hsa_compile.serve.server import serve as run_server

        try:
            limits = Limits(context, max_tokens, queue, body_bytes, seconds=seconds)
        except ValueError as error:
            fail(str(error))
        logging.getLogger("hsa_compile").setLevel(logging.INFO)  # says which provider, kernels and records are in use
        run_server(bundle_service(bundle, rows, limits, name, provider, fused, threads), host, port)


def validate(
    checkpoint: Checkpoint,
    bundle: Bundle,
    data: Data = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="Of PyTorch and ONNX Runtime; auto: a GPU where both can use one and the bundle is for one."),
    ] = "auto",
    tokens: Annotated[
        int | None, typer.Option(min=16, help="Of the text. Default: past several windows and chunks.")
    ] = None,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the table as JSON Lines.")] = None,
) -> None:
    """Check that reference, eager, compiled and ONNX Runtime agree, in the bundle's type; exits with 1 where they
    don't.

    Largest errors and their root mean squares are held against those of eager PyTorch in the same type. What cannot run
    on the device is listed below the table.
    """
    with friendly():
        from hsa_compile import validate as parity
        from hsa_compile.bench.record import write_suite
        from hsa_compile.model.checkpoint import load_checkpoint
        from hsa_compile.model.data import load_text, split_text

        with spinner("validating") as say:
            chosen = parity.choose_device(device, bundle)
            held_out = split_text(load_text(data))[1]
            found = parity.run(load_checkpoint(checkpoint).eval(), bundle, held_out, seed, say, chosen, tokens)
        console.print(parity.table(found))
        if output is not None:
            write_suite(output, parity.rows(found, seed))
        if found.failed:
            fail(f"{found.failed} of {len(found.checks)} comparisons failed")
