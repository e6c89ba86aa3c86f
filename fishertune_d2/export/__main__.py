"""Writes a trained model as a delta, or as plain files.

python -m fishertune_d2.export delta OUTPUT_DIR
python -m fishertune_d2.export plain OUTPUT_DIR|delta.safetensors [--layout timm]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils.logger import setup_logger

from fishertune_d2.command_line import add_import_option, ending_in_a_sentence, import_files

from .layouts import LAYOUTS, empty_backbone
from .model_card import ModelCard
from .tuned_models import delta_of_run, read_tuned


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m fishertune_d2.export", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    delta = commands.add_parser("delta", help="the difference to the public weights, a small file")
    plain = commands.add_parser("plain", help="the whole weights, in files for other programs")
    delta.add_argument("source", type=Path, help="OUTPUT_DIR of a run, or a checkpoint")
    plain.add_argument("source", type=Path, help="OUTPUT_DIR, a checkpoint, or a delta")
    delta.add_argument(
        "--decoder", action="store_true", help="include the whole decoder, to run the model"
    )
    plain.add_argument(
        "--layout",
        choices=list(LAYOUTS),
        default="timm",
        help="timm and transformers: the backbone; detectron2: the whole model, for MODEL.WEIGHTS",
    )
    for command, default in ((delta, "delta.safetensors"), (plain, "a folder named as the layout")):
        command.add_argument(
            "--config-file", type=Path, help="default: config.yaml beside the checkpoint"
        )
        command.add_argument(
            "--base",
            default="",
            metavar="FILE",
            help="the public weights, as MODEL.VFM.WEIGHTS; default: those that the run names",
        )
        add_import_option(command)
        command.add_argument("--output", type=Path, help=f"default: {default}, beside the source")
    options = parser.parse_args(arguments)
    with ending_in_a_sentence():
        import_files(options.imports)
        (_write_delta if options.command == "delta" else _write_plain)(options)


def _write_delta(options: argparse.Namespace) -> None:
    delta = delta_of_run(
        options.source, config_file=options.config_file, base=options.base, decoder=options.decoder
    )
    path = options.output or _folder(options.source) / "delta.safetensors"
    delta.save(path)
    ModelCard.loads(delta.notes["card"]).write(path.parent, delta.architecture, "delta", path.name)
    weights = empty_backbone(delta.architecture).vit.state_dict().values()
    print(
        f"{path}: {delta.changed:,} of {sum(w.numel() for w in weights):,} weights differ from the "
        f"public ones; {_size(path)}, the backbone has {sum(w.nbytes for w in weights):,}"
    )


def _write_plain(options: argparse.Namespace) -> None:
    model = read_tuned(options.source, config_file=options.config_file, base=options.base)
    folder = options.output or _folder(options.source) / options.layout
    LAYOUTS[options.layout](model, folder)
    model.card.write(folder, model.architecture, options.layout)
    for file in sorted(folder.iterdir()):
        print(f"{file}: {_size(file)}")


def _folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


if __name__ == "__main__":
    setup_logger(name="fishertune_d2", abbrev_name="fishertune")
    main()
