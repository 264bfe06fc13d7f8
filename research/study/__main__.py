"""Compare Latent Thought Models with their autoregressive twins, trained on the same tokens in the same order.

    python -m research.study                                        # research/studies/presidents.yaml
    python -m research.study my_study.yaml --output_dir outputs/my_study
    python -m research.study --settings tiny --models natural-2 twin --seeds 42

Trains and scores every cell of the grid (settings x models x seeds) that the output folder does not have yet, and
writes there a Markdown table, study.png and, for each cell, its model and scores as JSON. Stopped, it goes on where it
was. Every bound is scored with noise that no fit has seen; grid.py says what the fields of the YAML file mean.
"""

from pathlib import Path

from ltm_hf import cli

from . import Study, run_study

DEFAULT = Path(__file__).parents[1] / "studies" / "presidents.yaml"


@cli.one_sentence()
def main() -> None:
    parser = cli.Parser(description="A comparison of models trained on the same tokens.")
    parser.add_argument("grid", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--output_dir", type=cli.folder, help="default: outputs/ and the grid's name")
    parser.add_argument("--settings", nargs="+", help="run the cells of these alone")
    parser.add_argument("--models", nargs="+", help="run the cells of these alone")
    parser.add_argument("--seeds", nargs="+", type=cli.seed, help="run the cells of these alone")
    args = parser.parse_args()
    only = {name: chosen for name in ("settings", "models", "seeds") if (chosen := getattr(args, name))}
    folder = args.output_dir or Path("outputs") / args.grid.stem
    words = run_study(Study.from_yaml(args.grid), folder, only)
    print(f"\n{words}\nTables, picture and cells are in {folder}.")


if __name__ == "__main__":
    main()
