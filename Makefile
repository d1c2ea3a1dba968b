# make demo   train a world model and an agent inside it on CartPole        (SEED=0, RUN=runs/demo, ARGS="key=value ...")
# make test   the tests     (ARGS="tests/test_replay.py -k ends", WORKERS=2)
# make reliability   every fault of the catalogue, as often as docs/reliability.md says: kills, full disks, damage   (ARGS="-k kill")
# make lint   ruff, and types of signatures
# make bench  the measured tables; rows that are there already are not measured again     (ARGS="--print")
# make figures   writes the tables of README and docs from the rows; make figures-check fails where they differ, or quote stale rows unmarked
# make reference   writes docs/reference from the code; a test fails where it says something else
# make screenshots   pictures of TensorBoard for the docs, of RUN; wants Debian's packages chromium and chromium-driver
# make clean  removes caches and builds; runs/ and .venv/ stay
#
# The environment in .venv is made once, from constraints.txt, and refreshed when that or pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
RUN ?= runs/demo
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINKS := $(VENV)/links/worldmodel
# One thread per worker: two threads of torch under any other load can be slower than one by orders of magnitude.
ONE_THREAD := OMP_NUM_THREADS=1
# Whole files, since their fixtures train; the longest first, as tests/conftest.py sorts them.
BY_FILE := --dist loadfile --no-loadscope-reorder

.PHONY: help venv links demo test reliability lint bench figures figures-check reference screenshots clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile | sed -n '/^make/p'

venv: links

# worldmodel as one tree, for editors and type checkers (pyproject.toml names the folder to them).
links: $(STAMP)
	@rm -rf $(LINKS) && mkdir -p $(LINKS)
	@ln -s $(filter-out %/__pycache__,$(wildcard $(CURDIR)/worldmodel/*)) $(CURDIR)/agents $(CURDIR)/envs $(CURDIR)/configs $(LINKS)/

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): about a gigabyte, once. It may take some minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

# ---- demo --------------------------------------------------------------------------------------------------------------

define DEMO_BEFORE
CartPole-v1, seed $(SEED): a cart balances a pole; 500 is the best return of an episode, 475 counts as solved.

  1  Real experience.  The cart is pushed at random for some hundred steps. All that it sees goes into the replay.
  2  World model.      It learns from the replay: what an action leads to, what that earns, and whether the pole falls.
  3  Imagination.      The agent learns inside the world model, from imagined rollouts alone. No real step trains it.
  4  Reality.          The agent acts in the real environment, and what it meets there is learned from as well (2, 3, 4, ...).

Now and then the agent plays 20 real episodes without exploring. What follows is their mean return; the training ends as
soon as it is 475, and another 20 episodes confirm it. This takes minutes. Ctrl-C saves and stops.

endef
export DEMO_BEFORE

define DEMO_AFTER
import sys
import worldmodel as wm

run = wm.Run.open(sys.argv[1])
result, train, agent = run.result, run.config.train, run.config.agent
starts = min(agent.starts or train.batch_size * train.batch_length, train.batch_size * train.batch_length)
improvements = max(0, result["updates"] - train.pretrain)
reached = f"solved after {result['solved_at']} real steps" if result["solved_at"] is not None else "not solved"
print(f"""
  1  Real experience.  {result['real_steps']:,} real steps of {result['env_id']}, the first of them at random.
  2  World model.      {result['updates']:,} updates, each on {train.batch_size} sequences of {train.batch_length} steps ({result['wall_seconds']:.0f} seconds with 1 and 3).
  3  Imagination.      {improvements * starts * agent.horizon:,} imagined steps: all that the agent was trained on.
  4  Reality.          Mean return {result['final_return']:.1f} over 20 fresh real episodes (solved: {result['threshold']:g}): {reached}.

All of it is kept in {result['run']}:
  $(BIN)/worldmodel eval {result['run']} --video demo.gif     let the agent play, and film it
  $(BIN)/worldmodel dream {result['run']} --out dream.gif     let the model dream beside real episodes, and measure it
  $(BIN)/tensorboard --logdir {result['run']}                 what was logged while it learned: films, curves, codes
""")
endef
export DEMO_AFTER

demo: $(STAMP)
	@printf '%s\n' "$$DEMO_BEFORE"
	@run=$(RUN); number=1; \
	while [ -e "$$run" ]; do number=$$((number + 1)); run=$(RUN)-$$number; done; \
	$(BIN)/worldmodel train cartpole --seed $(SEED) --run "$$run" $(ARGS) && $(BIN)/python -c "$$DEMO_AFTER" "$$run"

# ---- checks ------------------------------------------------------------------------------------------------------------

test: links
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(BY_FILE) $(ARGS)

reliability: $(STAMP)
	RELIABILITY=full $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(BY_FILE) tests/reliability $(ARGS)

lint: links
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	@for script in $$(grep -l __main__ benchmarks/*.py | grep -v readme.py); do echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

figures: $(STAMP)
	$(BIN)/python benchmarks/readme.py

figures-check: $(STAMP)
	$(BIN)/python benchmarks/readme.py --check

reference: $(STAMP)
	$(BIN)/python docs/reference.py

screenshots: $(STAMP)
	$(BIN)/python docs/screenshots.py $(RUN) --out docs/images --pages scalars images text projector

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
