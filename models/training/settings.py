"""All that decides what a run computes: two runs of the same settings, on the same machine, end with the same bits."""

import dataclasses
from dataclasses import dataclass, field

from .errors import CheckpointError, SettingsError
from .recipe import Recipe, recipe

# 1,437 small images: what of a recipe is meant for 50,000
DIGITS = {"epochs": 60, "batch_size": 64}
PRECISIONS = ("fp32", "bf16", "fp64")


@dataclass(frozen=True)
class Settings:
    """data: "digits" or a path (where it is read from may change between a run and its continuation).

    model, options: for models.create. quantize: "W4A4", "W8A8", ... or None. recipe_name is for people to read.
    augment: what Images.padding, flip and jitter allow is done to them at random. precision "bf16" is autocast.
    image_size: see models.data.load.
    """

    data: str
    model: str
    recipe: Recipe
    options: dict = field(default_factory=dict)
    quantize: str | None = None
    recipe_name: str = "paper"
    augment: bool = True
    seed: int = 0
    impl: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    graphs: bool = False
    deterministic: bool = False
    image_size: int | None = None

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise SettingsError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not 0 <= self.seed < 2**63:
            raise SettingsError(f"seed must be in [0, 2**63), got {self.seed}")
        if self.compile and self.graphs:
            raise SettingsError("compile and graphs exclude each other: torch.compile makes graphs of its own")

    def as_dict(self) -> dict:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    def flat(self) -> dict:
        """{name: value} as `from_arguments` takes them: fields of Settings and of Recipe, the recipe by its name."""
        return {**dataclasses.asdict(self.recipe), **dataclasses.asdict(self), "recipe": self.recipe_name}

    @classmethod
    def from_dict(cls, data: dict) -> "Settings":
        return cls(**{**data, "recipe": Recipe(**data["recipe"])})


_RECIPE = [field.name for field in dataclasses.fields(Recipe)]
# what may differ when a run is continued; that the images are the same is checked by their hash
_MOVABLE = ("data", "image_size")


def from_arguments(given: dict, *, on_gpu: bool) -> Settings:
    """Settings of a new run from {name: value} of what was asked for: fields of Settings and of Recipe.

    The rest has defaults, some of which depend on the data and the device. SettingsError for bad values.
    """
    given = dict(given)
    data = given.setdefault("data", "digits")
    name = given.pop("recipe", "paper")
    changes = (DIGITS if data == "digits" else {}) | {key: given.pop(key) for key in _RECIPE if key in given}
    given.setdefault("model", "rir18_thin" if data == "digits" else "rir18_wide")
    given.setdefault("precision", "bf16" if on_gpu else "fp32")
    return Settings(recipe=recipe(name, **changes), recipe_name=name, **given)


def continued(stored: dict, given: dict) -> Settings:
    """Settings as a checkpoint has them; SettingsError where something else was asked for now.

    CheckpointError where they are not such settings: another version's, or nobody's.
    """
    try:
        settings = Settings.from_dict(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's settings are not those of this version ({error!r})") from error
    known = settings.flat()
    for name, value in given.items():
        if name not in _MOVABLE and value != known[name]:
            raise SettingsError(
                f"the run was started with {name}={known[name]!r}, not {value!r}: leave it out to continue that run, "
                "or begin another one in a folder of its own"
            )
    return dataclasses.replace(settings, **{name: given[name] for name in _MOVABLE if name in given})
