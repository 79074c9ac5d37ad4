"""What to do about a finding: every remedy that can be printed about a file, by name.

A remedy is a promise. ``tests/data/test_remedies.py`` holds a scenario for every one of them, in which a file is refused
with it, what it says is done, and the file is read; a remedy without a scenario fails there.
"""

from __future__ import annotations

from typing import Any

REMEDIES: dict[str, Remedy] = {}
"""Name -> remedy, of all that were made."""


class Fix(str):
    """The text of a remedy with its values filled in.

    Attributes:
        remedy: the name of the remedy that it came from.
        values: what was filled in.
    """

    remedy: str
    values: dict[str, Any]

    def of_layout(self, layout: str) -> Fix:
        """Return the text with the name of the layout that the file was read with, for ``--set data.affine.LAYOUT=...``."""
        return REMEDIES[self.remedy](**{**self.values, "layout": layout})


class Remedy:
    """A template of what to do.

    Args:
        name: unique.
        template: completes "Fix: "; values in braces, as for ``str.format``. ``{layout}`` is that of a plain folder
            until :meth:`Fix.of_layout` says another.
    """

    def __init__(self, name: str, template: str) -> None:
        if name in REMEDIES:
            raise ValueError(f"two remedies are called {name}")
        self.name, self.template = name, template
        REMEDIES[name] = self

    def __call__(self, **values: Any) -> Fix:
        fix = Fix(self.template.format(**{"layout": "folder", **values}))
        fix.remedy, fix.values = self.name, values
        return fix


def choice(option: str, *values: str) -> str:
    """Return how a user says what to take of a file that leaves a choice, in every command; ``{layout}`` is left open.

    Args:
        option: ``affine`` or ``channel``.
        values: those that work; each is written out.
    """
    ways = [f"--{option} {{}}", f"--set data.{option}.{{{{layout}}}}={{}}", f"{option}: {{}}"]
    line, setting, key = (" or ".join(way.format(value) for value in values) for way in ways)
    return f"{line} for data verify, data prepare and predict, {setting} for pretrain and bench, {key} in a task file"


SAY_SUBJECTS = "--subject-pattern '{0}', or in a task file subject: '{0}'"
"""How a user says which images show one person."""

# --- files -------------------------------------------------------------------------------------------

COPY_AGAIN = Remedy(
    "copy again", "copy or export the file again; if the source is damaged too, take the case out"
)
CHECK_PATH = Remedy("check path", "check the path, or take the case out of the cohort")
FETCH = Remedy(
    "fetch",
    "fetch or copy what it points to (git annex get, datalad get, dvc pull, a mount), or remove the link",
)
READABLE = Remedy("readable", "give yourself the right to read it, or take it out")
LOOK_AFTER = Remedy("look after", "look after its name, its folder and its permissions")
PUT_FILE = Remedy("put a file", "remove it, or put a file in its place")
CONVERT = Remedy("convert", "convert it to one that ends in {endings}")
EXPORT = Remedy("export", "export it again as a 3D scalar volume in one file, or take it out of the folder")
COPY_BOTH = Remedy("copy both", "copy both files together")
RUN_AGAIN = Remedy("run again", "run the command again")

# --- headers -----------------------------------------------------------------------------------------

SHRINK = Remedy(
    "shrink", "if the size is right, crop or resample the volume first; else copy or export the file again; if the "
    "source is damaged too, take the case out",
)  # fmt: skip
SPLIT = Remedy("split", "split it and keep one 3D volume, for example one time point or channel")
CHANNEL = Remedy(
    "channel",
    "choose one of its volumes, 0 to {last} (the first: " + choice("channel", "0") + "), or split it",
)
CHANNEL_RANGE = Remedy("channel range", "choose a channel from 0 to {last}")
STACK = Remedy("stack", "stack the slices into one volume")
SFORM = Remedy("sform", f"say that the sform is right ({choice('affine', 'sform')})")
QFORM = Remedy("qform", f"say that the qform is right ({choice('affine', 'qform')})")
AFFINE = Remedy(
    "affine",
    "find out which is right (programs differ in which they take) and say so "
    f"({choice('affine', 'sform', 'qform')})",
)
GEOMETRY = Remedy(
    "geometry", "write the right spacing and orientation into the header (nibabel or SimpleITK)"
)
ORIGIN = Remedy("origin", "write the right origin into the header (nibabel or SimpleITK)")

# --- values ------------------------------------------------------------------------------------------

REPLACE = Remedy("replace", "replace them by the value of air and save the file again")
OFFSET = Remedy(
    "offset",
    "give the constant that brings air to 0 and water to 1000, which seems to be {likely} here (--offset {likely} for "
    "data verify, data prepare and predict, --set data.intensity_offset.{layout}={likely} for pretrain and bench, "
    "intensity_offset: {likely} in a task file)",
)
NO_CT = Remedy(
    "no CT",
    "take it out if it is no CT; if it is, bring its values to HU, or read the data without units "
    "(--scaling minmax for data prepare, preparation: {{scaling: minmax}} in a task file)",
)
MODALITY = Remedy(
    "modality",
    'take it out, or correct the modality (modality in a task file, "channel_names" in a dataset.json)',
)
TWO_KINDS = Remedy(
    "two kinds", "keep CT and MR in folders of their own, or leave out the smaller part (--policy skip)"
)
TWO_CTS = Remedy("two kinds of CT", "bring all to HU, or leave out the smaller part (--policy skip)")

# --- labels and cohorts -----------------------------------------------------------------------------

INTEGERS = Remedy("integers", "save the segmentation with one integer a structure")
EMPTY_LABEL = Remedy(
    "empty label",
    "draw the structures, take the case out, or allow empty labels (empty_labels: true in a task file)",
)
LABEL_VALUES = Remedy(
    "label values",
    "correct the label file, or name the values (labels or ignore_labels in a task file, --labels {values} for data "
    "verify and data prepare, label_values in an adapter)",
)
NAME_VALUES = Remedy(
    "name values",
    "name them: --labels {values} with names of your own, or labels in a task file (--task FILE)",
)
LABEL_GRID = Remedy(
    "label grid", "resample the label to the grid of {image} (nearest neighbour), or correct its header"
)
KEEP_ONE = Remedy(
    "keep one", "keep one of the two; if they are different people, copy both again from the source"
)
OWN_LABEL = Remedy(
    "own label",
    f"give each image its own label; if both show one person, say so ({SAY_SUBJECTS.format('REGEX')})",
)
ONE_SCAN = Remedy(
    "one scan",
    f"keep one of the two, or say that both are of one person ({SAY_SUBJECTS.format('{pattern}')}, or the column subject of "
    "a CSV)",
)
ONE_PART = Remedy("one part", "keep all images of a person in one part")
ABSENT = Remedy("absent", "correct the name or its value, add cases that have it, or take it out")

# --- layouts -----------------------------------------------------------------------------------------

ENDING = Remedy("ending", "convert it, or correct file_ending")
PROMISE = Remedy("promise", "add the missing ones, or correct {key}")
NUMBER = Remedy("number", "call it {name} if it is channel {channel} of a case, or take it out")

# --- preparation -------------------------------------------------------------------------------------

COARSER = Remedy(
    "coarser",
    "correct the spacing in its header if it is wrong; else prepare with a coarser spacing (--spacing for data "
    "prepare, --set data.spacing_mm for pretrain and bench, preparation: {{spacing_mm: ...}} in a task file) or "
    "another crop",
)
GIVE_MASK = Remedy("give mask", "give one named like the image, or choose another crop")
GIVE_LABEL = Remedy("give label", "give its label, or choose a crop that needs none")
CROP_OF_CT = Remedy("crop of CT", 'choose crop "foreground" or "none"')
OTHER_CROP = Remedy("other crop", "choose another crop, or take the case out")

# --- DICOM series ------------------------------------------------------------------------------------

NOT_A_LABEL = Remedy("not a scan", "take it out (one that is meant as a label: convert it to NIfTI)")
TAKE_OUT = Remedy("take out", "take it out of the folder")
HOLDS_NONE = Remedy("holds none", "check the path")
NAME_SERIES = Remedy("name series", "name the series by one of its slices")
COPY_FILE = Remedy("copy file", "copy the file again")
COPY_OR_OUT = Remedy("copy or out", "copy the file again, or take it out of the folder")
DCM2NIIX = Remedy("multi-frame", "convert it to NIfTI, for example with dcm2niix, and give that")
NO_SCAN = Remedy("colour", "take it out: it is no scan")
ADD_SLICES = Remedy("add slices", "add the other slices of its series, or take it out")
EXPORT_SERIES = Remedy("export series", "export the series again")
OWN_SERIES = Remedy(
    "own series", "export each orientation as a series of its own (localizers: take them out)"
)
ONE_VOLUME = Remedy("one volume", "export one volume a series")
COPY_SLICES = Remedy("copy slices", "copy the missing slices")
EQUAL_STEPS = Remedy("equal steps", "resample it to equal steps (dcm2niix does)")
STRAIGHTEN = Remedy("straighten", "straighten it first (dcm2niix does)")
COPY_SERIES = Remedy("copy series", "copy or export the series again")
OF_SCANNER = Remedy("of the scanner", "export it as a series of the scanner")
