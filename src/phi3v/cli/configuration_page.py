"""docs/configuration.md, made from the fields: ``python -m phi3v.cli.configuration_page`` prints it."""

import sys

from phi3v.config import SECTIONS, EvalConfig, RunConfig, TrainConfig, describe_fields


def configuration_page() -> str:
    """Returns docs/configuration.md."""
    return _PAGE.format(train=_table(TrainConfig), eval=_table(EvalConfig))


def _table(cls: type[RunConfig]) -> str:
    lines = []
    for section in SECTIONS:
        rows = [one for one in describe_fields(cls) if one.section == section]
        if rows:
            lines += [f"### {section.capitalize()}", "", "| field | default | allowed | meaning |", "|---|---|---|---|"]
        for one in rows:
            needs = f" Needs `{'`, `'.join(one.needs)}`.".replace("|", "` or `") if one.needs else ""
            lines.append(f"| `{one.name}` | {one.default_text} | {one.allowed} | {one.doc}{needs} |")
        if rows:
            lines.append("")
    return "\n".join(lines).rstrip()


_PAGE = """\
# Configuration

<!-- Printed by `python -m phi3v.cli.configuration_page`; change src/phi3v/config/ and print it again. -->

A run is described by a flat YAML file, by options on the command line, or by both; the command line wins.

```
phi3v train recipe.yaml --learning_rate 1e-4 --eval_steps 50
phi3v eval --model runs/docvqa/model --data val.jsonl --output_dir runs/docvqa-val --metric anls
```

- The configuration file stands first; options follow as `--field value` or `--field=value`. Dashes and underscores are
  the same in names: `--batch-size` is `--batch_size`.
- True or false: `--keep_best`, `--no-keep_best`, `--keep_best false`.
- Lists: `--freeze vision projector`, `--freeze vision,projector`, `--freeze vision --freeze projector` or
  `--freeze "[vision, projector]"`; a path with a comma in it needs the last form. A list on the command line replaces
  the file's. In YAML, a list of one may be written as the one value.
- Mappings: `--part_learning_rates vision=1e-5,projector=1e-4`, or a mapping in YAML.
- `none` (or `null`) clears a field that may be empty.
- Relative paths, in the file too, are relative to the working directory; `~` is the home directory.
- A field that nothing would read in the run is refused ("needs" below), unless the file sets it and the command line
  has switched off what it belongs to: `phi3v train lora-recipe.yaml --method full` passes over the file's `lora_rank`.
- A training run writes its whole configuration to `config.yaml` in its output folder; `phi3v train` reads that file
  again as it is.

## phi3v train

{train}

## phi3v eval

{eval}
"""

if __name__ == "__main__":
    sys.stdout.write(configuration_page())
