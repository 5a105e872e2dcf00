"""`convert`: Hugging Face and Megatron checkpoints, file to file."""

from __future__ import annotations

from pathlib import Path

import click

_EXISTING = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Convert checkpoints between Hugging Face and Megatron's torch_dist, without a model, a GPU or torch."""


@command.command("import")
@click.argument("hf", type=_EXISTING)
@click.argument("out", type=_EXISTING)
@click.option(
    "--dialect",
    type=click.Choice(["te", "local", "both"]),
    default="te",
    show_default=True,
    help="Keys of Transformer Engine's layer spec, of the local one, or both naming the same bytes.",
)
@click.option(
    "--layer-keys",
    type=click.Choice(["auto", "stacked", "per-layer"]),
    default="auto",
    show_default=True,
    help="One key for all layers, or one for each (when --moe-layer-freq is a list).",
)
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--memory-mib", type=click.IntRange(1), default=512, show_default=True)
@click.option("--node", type=click.IntRange(0), default=0)
@click.option("--nodes", type=click.IntRange(1), default=1)
@click.option("--allow-non-finite", is_flag=True)
def import_(
    hf: Path,
    out: Path,
    dialect: str,
    layer_keys: str,
    processes: int,
    memory_mib: int,
    node: int,
    nodes: int,
    allow_non_finite: bool,
) -> None:
    """Write the torch_dist checkpoint OUT from the Hugging Face model HF."""
    from moe_bench.checkpoint.families import family_of
    from moe_bench.checkpoint.importing import ImportOptions, run_import
    from moe_bench.checkpoint.mapping import count_mtp, map_model
    from moe_bench.checkpoint.plan import make_plan
    from moe_bench.checkpoint.source import open_hf

    source = open_hf(hf)
    family = family_of(source.config)
    keys = (
        layer_keys
        if layer_keys != "auto"
        else ("per-layer" if family.per_layer_keys else "stacked")
    )
    model_map = map_model(
        family,
        source.config,
        dialect=dialect,
        layer_keys=keys,
        num_mtp=count_mtp(family, source.config, source.tensors),
    )
    plan = make_plan(source, model_map)
    options = ImportOptions(
        processes=processes,
        memory_bytes=memory_mib << 20,
        node=node,
        nodes=nodes,
        allow_non_finite=allow_non_finite,
    )
    print(run_import(plan, out, options))
