"""A bench on many machines: one description of its work (:mod:`work`), one function that does it (:mod:`worker`), one that
collects it (:mod:`driver`), and an engine a file: Ray, Slurm."""
