"""Print the lower bounds of pyproject.toml as pip's constraints."""

import re
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
wanted = [project["dependencies"], extras["bnb"], extras["trl"]]
for line in sorted({line for lines in wanted for line in lines}):
    if bound := re.fullmatch(r"([\w-]+)>=([\d.]+)", line):
        version = bound[2] if "." in bound[2] else f"{bound[2]}.0"
        print(f"{bound[1]}=={version}.*")
