"""The precision of each matrix: recipes by name, and exceptions by pattern.

Knows paths and schemes. Does not know tensors or files.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from magistral_mlx.config import ModelConfig, Quantization, Scheme
from magistral_mlx.errors import ConversionError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`default` for every matrix (None: unquantized), `finer` for the most sensitive ones.

    exceptions: (pattern, scheme); shell-style patterns of module paths: `model.layers.*.mlp.down_proj`. The
    last match wins; a pattern that matches nothing is refused. A matrix whose row length is not a multiple of
    the group size is never quantized.
    """

    name: str
    default: Scheme | None
    finer: Scheme | None = None
    exceptions: tuple[tuple[str, Scheme | None], ...] = ()

    def scheme(self, path: str, columns: int, n_layers: int) -> Scheme | None:
        """The scheme of the matrix at `path`, which has `columns` columns."""
        chosen = self.finer if self.finer and _is_sensitive(path, n_layers) else self.default
        for pattern, scheme in self.exceptions:
            if fnmatchcase(path, pattern):
                chosen = scheme
        return chosen if chosen and columns % chosen.group_size == 0 else None

    def quantization(self, config: ModelConfig) -> Quantization | None:
        """The `quantization` of `config.json`: the default scheme, and every matrix that has another."""
        schemes = {
            path: self.scheme(path, columns, config.n_layers) for path, (_, columns) in config.matrices()
        }
        for pattern, _ in self.exceptions:
            if not any(fnmatchcase(path, pattern) for path in schemes):
                raise ConversionError(
                    f"the exception {pattern!r} matches no matrix of this model; they are called "
                    f"{', '.join(list(schemes)[:3])} …, and a * stands for any part of a name"
                )
        default = self.default or next((scheme for scheme in schemes.values() if scheme), None)
        if default is None or not any(schemes.values()):
            return None
        return Quantization(default=default, overrides={p: s for p, s in schemes.items() if s != default})

    def but(self, exceptions: Iterable[tuple[str, str]]) -> "Recipe":
        """This recipe with exceptions, each a pattern and the name of a recipe without `finer`."""
        added = [(pattern, named(name)) for pattern, name in exceptions]
        for pattern, recipe in added:
            if recipe.finer:
                raise ConversionError(f"{pattern!r} needs a recipe of one precision; {recipe.name} has two")
        schemes = tuple((pattern, recipe.default) for pattern, recipe in added)
        return replace(self, exceptions=self.exceptions + schemes)

    def __str__(self) -> str:
        return self.name + "".join(f", {p}: {s or 'unquantized'}" for p, s in self.exceptions)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="4bit", default=Scheme()),
        Recipe(name="4bit-g32", default=Scheme(group_size=32)),
        Recipe(name="mixed-4-6", default=Scheme(), finer=Scheme(bits=6)),
        Recipe(name="6bit", default=Scheme(bits=6)),
        Recipe(name="8bit", default=Scheme(bits=8)),
        Recipe(name="mxfp4", default=Scheme.of_mode("mxfp4")),
        Recipe(name="nvfp4", default=Scheme.of_mode("nvfp4")),
        Recipe(name="bf16", default=None),
    )
}


def named(name: str) -> Recipe:
    """The recipe of that name."""
    if name not in RECIPES:
        raise ConversionError(f"expected one of the recipes {', '.join(RECIPES)}, found {name!r}")
    return RECIPES[name]


def uniform(scheme: Scheme) -> Recipe:
    """The recipe with one scheme for every matrix: a named one if there is one."""
    same = (recipe for recipe in RECIPES.values() if recipe.default == scheme and recipe.finer is None)
    made = Recipe(name=f"{scheme.mode}-{scheme.bits}bit-g{scheme.group_size}", default=scheme)
    return next(same, made)


def stored(config: ModelConfig) -> Recipe:
    """The recipe of an existing checkpoint, from its config."""
    packed = config.quantization or Quantization()
    ours = {path for path, _ in config.matrices()}  # a vision tower's are not loaded
    exceptions = tuple((path, scheme) for path, scheme in packed.overrides.items() if path in ours)
    return Recipe(
        name="stored", default=packed.default if config.quantization else None, exceptions=exceptions
    )


def _is_sensitive(path: str, n_layers: int) -> bool:
    """mlx-lm's choice, after llama.cpp's Q4_K_M: lm_head; v_proj and down_proj in the first and last eighth
    of the layers, and in every third between.
    """
    if path == "lm_head":
        return True
    if not path.endswith(("v_proj", "down_proj")):
        return False
    layer, eighth = int(path.split(".")[2]), n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
