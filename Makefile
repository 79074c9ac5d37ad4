# `make bench` and `make test` are the two commands of the README. Each makes .venv when missing.
PYTHON ?= python3
BIN := .venv/bin
STORE ?= results-store
# Processes of the study; one GPU has room for a dozen.
JOBS ?= 2
REALDATA ?= runs/realdata
STUDIES := $(filter-out %/smoke.yaml %/comparison.yaml %/appearance.yaml %/study_steps.yaml %/matching.yaml,$(wildcard benchmarks/studies/levers/*.yaml))
STUDIED := scratch,random_labels,denoising,inpainting,models_genesis,rotation,deepcluster,simsiam,byol,simclr,gvsl,gvsl_without_zmatching,gvsl_without_fundament,gvsl_without_affine,gvsl_released_head
# Those that are fine-tuned, and that have eight seeds: baselines, GVSL, its restoration, the best two in development.
EIGHT := scratch,random_labels,denoising,inpainting,gvsl
FINETUNED := $(EIGHT),gvsl_without_zmatching
# Brains with all labels learn for longer (docs/study.md).
LONG := --set downstream.finetune.steps=3840 --set downstream.finetune.validate_every=960
ABLATIONS := scratch,gvsl,gvsl_without_zmatching,gvsl_without_fundament,gvsl_without_affine,gvsl_affine_untrained

# Put the committed records of a study into a store of this one's, so that they are not computed again.
committed = if [ -d benchmarks/studies/$(2) ]; then $(BIN)/ssl3d store merge $(STORE)/$(1) benchmarks/studies/$(2); fi

.PHONY: faults check-results speed bench quick bench-all study study-labels study-matching matching-curve study-steps floor levers appearance ablations smoke realdata test lint phantom-pictures clean

# The stamp is renewed when the dependencies change.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev,realdata]"
	touch $@

# A first table: phantoms, pretraining, evaluation; under five minutes on two cores.
bench: .venv/.installed
	$(BIN)/ssl3d bench --preset demo --modes linear --methods scratch,gvsl --tasks shc,sac,ccc,sbm --store $(STORE)/demo

# The same at the preset that a laptop has time for: half an hour.
quick: .venv/.installed
	$(BIN)/ssl3d bench --preset quick --methods scratch,gvsl --tasks shc,sac,ccc,sbm --store $(STORE)

# Every row of table 1 but the ablations; goes on with the cells that `make quick` finished.
bench-all: .venv/.installed
	$(BIN)/ssl3d bench --preset quick --methods all --tasks shc,sac,ccc,sbm --store $(STORE)
	mkdir -p benchmarks/studies/results
	$(BIN)/ssl3d table --store $(STORE) --format markdown --with ci --against paper > benchmarks/studies/results/table1-quick.md
	$(BIN)/ssl3d table --store $(STORE) --format csv --with ci --against paper > benchmarks/studies/results/table1-quick.csv
	$(BIN)/python benchmarks/studies/order.py benchmarks/studies/results/table1-quick.csv > benchmarks/studies/results/order-quick.md

# The study of docs/study.md, seed by seed; goes on where it stopped, and with the records that are committed.
study: .venv/.installed
	$(call committed,study,study)
	$(call committed,study,study-full)
	for seed in 0 1 2 3 4; do \
		$(BIN)/ssl3d bench --preset study --methods $(STUDIED) --tasks shc,sac,ccc,sbm --modes linear,multiscale \
			--seeds $$seed --jobs $(JOBS) --store $(STORE)/study || exit 1; \
	done
	for seed in 0 1 2 3 4; do \
		$(BIN)/ssl3d bench --preset study --methods $(FINETUNED) --tasks shc,sbm --modes finetune \
			--label-fractions 0.1,0.25 --seeds $$seed --jobs $(JOBS) --store $(STORE)/study || exit 1; \
	done
	for seed in 0 1 2 3 4; do \
		$(BIN)/ssl3d bench --preset study --methods $(FINETUNED) --tasks shc --modes finetune \
			--seeds $$seed --jobs $(JOBS) --store $(STORE)/study || exit 1; \
		$(BIN)/ssl3d bench --preset study --methods $(FINETUNED) --tasks sbm --modes finetune $(LONG) \
			--seeds $$seed --jobs $(JOBS) --store $(STORE)/study || exit 1; \
	done
	$(BIN)/ssl3d bench --preset study --methods $(EIGHT) --tasks shc,sac,ccc,sbm --modes linear,multiscale \
		--seeds 5,6,7 --jobs $(JOBS) --store $(STORE)/study
	mkdir -p benchmarks/studies/results
	$(BIN)/python benchmarks/studies/primary.py --store $(STORE)/study --out docs/images/study_primary.png
	$(BIN)/python benchmarks/studies/separation.py $(STORE)/study > benchmarks/studies/results/separation.md
	$(BIN)/python benchmarks/studies/losses.py $(STORE)/study > benchmarks/studies/results/losses.md
	$(BIN)/python benchmarks/studies/seeds.py $(STORE)/study --out docs/images/study_seeds.png

# How much a label is worth to scratch: development cohort, trained until its validation rests; half an hour on a core.
study-labels: .venv/.installed
	$(call committed,curve,curve)
	$(BIN)/ssl3d bench --preset study --set phantoms.profile=development --methods scratch --tasks shc --modes finetune \
		--label-fractions 0.05,0.1,0.25,0.5,1 --seeds 0 --jobs $(JOBS) --store $(STORE)/curve
	$(BIN)/ssl3d bench --preset study --set phantoms.profile=development --methods scratch --tasks sbm --modes finetune \
		--set downstream.finetune.steps=3840 --set downstream.finetune.validate_every=480 \
		--label-fractions 0.05,0.1,0.25,0.5,1 --seeds 0 --jobs $(JOBS) --store $(STORE)/curve
	$(BIN)/python benchmarks/studies/learning_curve.py $(STORE)/curve --out docs/images/study_labels.png

# What the records do not hold: how well GVSL's heads match, with the study's own runs.
study-matching: .venv/.installed
	for method in gvsl gvsl_released_head; do \
		$(BIN)/python benchmarks/studies/matching.py --preset study --method $$method --seeds 0 1 2 3 4 \
			--store $(STORE)/study --out benchmarks/studies/results/matching-study-$$method.json || exit 1; \
	done

# Does it match better after 5,000 steps? Four hours on a core.
matching-curve: .venv/.installed
	$(BIN)/python benchmarks/studies/run.py benchmarks/studies/levers/matching.yaml --store $(STORE)/matching \
		--out benchmarks/studies/results
	$(BIN)/python benchmarks/studies/matching_curve.py benchmarks/studies/levers/matching.yaml --store $(STORE)/matching \
		--scores benchmarks/studies/results/matching.csv --draw docs/images/matching_curve.png

# More steps of pretraining: eight hours on two cores. Those of 360 are the study's.
study-steps: .venv/.installed
	$(call committed,study-steps,study)
	$(call committed,study-steps,study-steps)
	$(BIN)/python benchmarks/studies/run.py benchmarks/studies/levers/study_steps.yaml --store $(STORE)/study-steps \
		--out benchmarks/studies/results
	$(BIN)/python benchmarks/studies/trend.py benchmarks/studies/results/study_steps.csv --out docs/images/study_steps.png

# The luck of rounding, for each column and mode; goes on where it stopped.
floor: .venv/.installed
	$(BIN)/python benchmarks/studies/floor.py --preset quick --runs 8

# One figure a lever, on the development cohort.
levers: .venv/.installed
	$(BIN)/python benchmarks/studies/run.py $(STUDIES) --store $(STORE)/levers --out benchmarks/studies/results

# What differences in appearance do, on the benchmark cohort.
appearance: .venv/.installed
	$(call committed,appearance,appearance)
	$(BIN)/python benchmarks/studies/run.py benchmarks/studies/levers/appearance.yaml --store $(STORE)/appearance \
		--out benchmarks/studies/results
	$(BIN)/python benchmarks/studies/interaction.py --store $(STORE)/appearance --factor phantoms.appearance_variance \
		--against scratch gvsl --out docs/images/study_appearance.png

ablations: .venv/.installed
	$(BIN)/ssl3d bench --preset quick --methods $(ABLATIONS) --modes linear --tasks shc,sac,ccc,sbm --store $(STORE)

smoke: .venv/.installed
	$(BIN)/ssl3d bench --preset smoke --methods scratch,gvsl --tasks shc,sac,ccc,sbm --store $(STORE)/smoke

# A brain task from real volumes that packages ship, see docs/realdata.md.
realdata: .venv/.installed
	$(BIN)/python -m pytest tests/studies/test_realdata.py
	$(BIN)/python benchmarks/studies/realdata/make_mni.py --out $(REALDATA)
	$(BIN)/python benchmarks/studies/realdata/picture.py $(REALDATA) --out docs/images/realdata_mni.png
	$(BIN)/ssl3d bench --preset benchmarks/studies/realdata/realdata.yaml --methods scratch,gvsl --tasks $(REALDATA)/mni.yaml \
		--data $(REALDATA)/pretrain --store $(STORE)/realdata
	mkdir -p benchmarks/studies/results
	$(BIN)/ssl3d table --store $(STORE)/realdata --format markdown --with ci > benchmarks/studies/results/realdata.md

test: .venv/.installed lint
	$(BIN)/python -m pytest

# Every trial of docs/reliability.md, with a table at the end; the tests make a part of them. A quarter of an hour on a core.
faults: .venv/.installed
	SSL3D_ALL_FAULTS=1 $(BIN)/python -m pytest -n 0 tests/faults

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Do the tables of README.md and docs/ follow from committed records that are current?
check-results: .venv/.installed
	$(BIN)/python benchmarks/check_results.py

# How fast, against what: one table of ratios against peers, on one thread; twelve minutes. On a GPU: benchmarks/speed/gpu.py.
speed: .venv/.installed
	$(BIN)/python -m pip install --quiet -e ".[speed]"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed/compare.py

phantom-pictures: .venv/.installed
	$(BIN)/python benchmarks/studies/phantom_pictures.py --out docs/images

# The results are not deleted.
clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
