"""Convert the UCF-101 subset with the published script's flags; see docs/recipes.md.

python recipes/convert_ucf101.py --out_dir data/ucf101
"""

import sys
from pathlib import Path

from phi3v.arguments import Parser, exit_code
from phi3v.data.convert.ucf101 import convert_ucf101


def main() -> None:
    """Reads the flags, converts, and prints what was written."""
    parser = Parser(prog="convert_ucf101.py", description=(convert_ucf101.__doc__ or "").partition("\n")[0])
    flag = parser.add_argument
    flag("--out_dir", type=Path, default=Path("ucf101"), metavar="PATH", help="where to write (default: ./ucf101)")
    flag("--tmp_dir", type=Path, default=Path("/tmp/ucf101"), metavar="PATH", help="where to unpack (%(default)s)")
    flag("--source", metavar="PATH", help="UCF101_subset.tar.gz or its folder (default: the hub's)")
    flags = parser.parse_args()
    print(convert_ucf101(flags.source, flags.out_dir, tmp_dir=flags.tmp_dir))


if __name__ == "__main__":
    sys.exit(exit_code(main))
