"""The phantom cohorts: procedural anatomy of fixed topology, varying shape and appearance."""

from ssl3d.data.phantoms.subjects import COHORTS as COHORTS
from ssl3d.data.phantoms.subjects import PhantomParameters as PhantomParameters
from ssl3d.data.phantoms.subjects import PhantomSubject as PhantomSubject
from ssl3d.data.phantoms.subjects import generate as generate
from ssl3d.data.phantoms.write import write_cohorts as write_cohorts
