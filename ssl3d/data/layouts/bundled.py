"""The layouts that come with ssl3d."""

from __future__ import annotations

from ssl3d.data.cohort import Dataset
from ssl3d.data.layouts.bids import BIDS
from ssl3d.data.layouts.csv_table import Table
from ssl3d.data.layouts.msd import MSD
from ssl3d.data.layouts.nnssl import NNSSL
from ssl3d.data.layouts.nnunet import NNUNet

LAYOUTS: tuple[Dataset, ...] = (NNUNet(), MSD(), BIDS(), NNSSL(), Table())
