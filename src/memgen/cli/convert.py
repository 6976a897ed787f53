"""`memgen convert`: imports a checkpoint of the released code, or exports one of ours in its format."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Converts a directory: a released checkpoint to ours, or ours to a released one.

    Args:
        argv: the arguments behind the command.

    Returns:
        The exit status.

    Raises:
        ValueError: if the source is neither format, or does not fit the base.
    """
    options = _parser().parse_args(argv)

    from memgen.chat import load_tokenizer
    from memgen.lab.assets import resolve_asset
    from memgen.model.backbone import BackboneConfig
    from memgen.model.memgen import MemGenModel
    from memgen.training import checkpoint

    if (options.source / checkpoint.CONFIG_FILE).is_file():
        model, config = checkpoint.open_checkpoint(options.source, load_tokenizer, resolve_asset)
        checkpoint.export_released(model, config, options.target)
        print(
            f"{options.target}: in the released code's format, {len(checkpoint.released_names(model))} tensors"
        )
        return 0
    if options.backbone is None:
        raise checkpoint.CheckpointError("the released format names no base: give --backbone NAME")
    names = {
        "reasoner": options.backbone,
        "weaver": options.weaver_backbone,
        "trigger": options.trigger_backbone,
    }
    backbones = {
        part: BackboneConfig(name, dtype=options.dtype) for part, name in names.items() if name is not None
    }
    config = checkpoint.released_config(options.source, backbones, options.trigger)
    tokenizer = load_tokenizer(resolve_asset(options.backbone))
    model = MemGenModel.build(config, tokenizer, resolve_asset, load_tokenizer=load_tokenizer)
    report = checkpoint.import_released(model, options.source)
    checkpoint.save_checkpoint(model, config, options.target, with_trigger=options.trigger == "tokens")
    print(
        f"{options.target}: {len(report.matched)} tensors; memgen generate --checkpoint {options.target} reads it"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memgen convert",
        description="Import a checkpoint of the released code (config.json, projs.bin, weaver.bin, ...) as one of ours, "
        "or export one of ours (memgen.json) in that format.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint directory to read")
    parser.add_argument("target", type=Path, metavar="TARGET", help="checkpoint directory to write")
    parser.add_argument(
        "--backbone", metavar="NAME", help="import: the reasoner's base, a directory or hub name"
    )
    parser.add_argument(
        "--weaver-backbone", metavar="NAME", help="import: the weaver's base, if it has its own"
    )
    parser.add_argument(
        "--trigger-backbone", metavar="NAME", help="import: the trigger's base, if it has its own"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the bases"
    )
    parser.add_argument(
        "--trigger",
        default="always",
        choices=["always", "tokens"],
        help="import: always invokes at every boundary, as the released scripts evaluate (default); tokens uses the "
        "checkpoint's trigger",
    )
    return parser
