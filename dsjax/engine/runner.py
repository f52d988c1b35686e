"""The device's side of the engine: its arrays, and the launching of steps on them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container
from collections.abc import Sequence as Listing
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dsjax.cache import LatentPool, pool_dims
from dsjax.config import EngineConfig
from dsjax.engine import programs
from dsjax.engine.compiled import are_quantised, compiled
from dsjax.engine.host_reader import HostReader, Tables
from dsjax.engine.launcher import Launcher
from dsjax.engine.packing import Choice, LastSent, pack_changes, pack_choices, pack_rows
from dsjax.engine.pending import Chosen, Reading, Row, copy_to_host
from dsjax.engine.programs import ChoiceShape, ModelKey, RowShape
from dsjax.engine.shapes import Shapes, first_chunks
from dsjax.engine.sizes import expert_capacity, num_lanes, pool_shapes, serving_model_rules
from dsjax.engine.state import Limits, Sequence, Step
from dsjax.inference.sampler import PACKED_SIZE, LogitChanges
from dsjax.model import DeepSeekV2, abstract_model
from dsjax.weights.host_experts import host_experts_of


class Runner:
    """Holds a model, the pool and the tables, and runs steps; knows nothing of requests.

    All launches return before the device is done. To launch a step's many kernels takes the host
    milliseconds, so a thread does it, and launches the choice after them, while the host takes what
    the step before gave; where experts are in the host's memory, that thread reads a row layer by
    layer. What else touches the arrays waits for the thread first.
    """

    def __init__(
        self,
        model: DeepSeekV2,
        config: EngineConfig,
        limits: Limits,
        num_pages: int,
        known_W: np.ndarray,
    ) -> None:
        """Allocates nothing yet; `reset` does.

        Args:
            model: the model; of shapes alone, for who only wants its programs compiled.
            config: sizes.
            limits: what each lane's scheduler keeps to.
            num_pages: pages of each layer's part of a device's pool.
            known_W: bool, ids that the tokenizer has.
        """
        mesh = model.options.rules.mesh
        if mesh is not None:
            self._sharding: jax.sharding.Sharding = NamedSharding(mesh, PartitionSpec())
        else:
            (device,) = jax.tree.leaves(nnx.state(model))[0].sharding.device_set
            self._sharding = SingleDeviceSharding(device)
        self._config = config
        self._limits = limits
        step = model.options.kernels.min_decode_rows
        self._num_lanes = num_lanes(model)
        of_lane = (-(-size // self._num_lanes) for size in config.decode_sizes())
        self.shapes = Shapes(
            tuple(sorted({-(-size // step) * step for size in of_lane})),
            -(-limits.max_batch // step) * step,
            limits.chunks,
            self._num_lanes,
            config.prompt_logprobs,
            # Who compiles what a call needs, when it needs it, waits for each program.
            first_chunks(model.config.attention, limits.chunks) if config.warm_up else (),
        )
        self._vocab_size = model.config.vocab_size
        rules = serving_model_rules(model)
        self._nobody = self._num_lanes * limits.max_batch
        graphdef, state = nnx.split(model)
        if rules != model.options.rules:  # the arrays stay where they are
            options = model.options
            graphdef, _ = abstract_model(model.config, options.runtime, rules, options.kernels)
        leaves, treedef = jax.tree.flatten(state)
        self._key = ModelKey(graphdef, treedef)
        spelled = (model.config, model.options.runtime, rules, model.options.kernels)
        self._spelling = " ".join(map(repr, spelled))
        self._unrolls = model.options.kernels.unroll_decode
        self._leaves = tuple(leaves)
        self._known_ids = known_W
        self._pool_sharding = rules.sharding(*pool_dims(rules)) or self._sharding
        self._logits_sharding = rules.sharding("batch", None) or self._sharding
        self._shapes = self._array_shapes(pool_shapes(model, config, num_pages))
        self._arrays: _Arrays | None = None
        self._host_reader: HostReader | None = None
        if (experts := host_experts_of(model)) is not None:
            capacity = expert_capacity(model, config, num_pages)
            self._host_reader = HostReader(
                self._key, self._leaves, experts, capacity, self._sharding
            )
        self._programs: dict[_ProgramKey, Any] = {}
        self._launcher = Launcher()

    # Arrays

    def reset(self) -> None:
        """Allocates the pool and the tables anew, as at the start and after a failed step."""
        self._launcher.wait()
        self._arrays = None
        self._put_choices = LastSent(self._put)
        self._known_W = self._put(self._known_ids)
        self._arrays = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), self._shapes
        )

    def close(self) -> None:
        """Frees the pool and the tables, and experts that are in the host's memory anyway."""
        self._launcher.close()
        with contextlib.suppress(Exception):  # of a step that failed
            jax.block_until_ready(self._arrays)  # a process that ends under a step is aborted
        self._arrays = None
        if self._host_reader is not None:
            self._host_reader.forget()

    def update_weights(self, state: nnx.State) -> None:
        """Puts other weights in the place of the model's: same shapes, types and layout.

        Raises:
            ValueError: names the first that differs.
        """
        if self._host_reader is not None:
            raise ValueError("weights: not replaced while experts are in the host's memory")
        flat, treedef = jax.tree.flatten(state)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
        if treedef != self._key.treedef:
            raise ValueError("weights: their names are not those of the model")
        for path, old, new in zip(paths, self._leaves, flat, strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"weights{path}: {new.dtype}{list(new.shape)} cannot replace "
                    f"{old.dtype}{list(old.shape)}"
                )
        self._leaves = tuple(
            jax.device_put(new, old.sharding) for old, new in zip(self._leaves, flat, strict=True)
        )

    def _array_shapes(self, pool: LatentPool) -> _Arrays:
        slots = self._nobody + 1
        columns = -(-self._limits.max_length // pool.page_size)
        tables: Any = (self._shape((slots,), jnp.int32), self._shape((slots, columns), jnp.int32))
        place = self._pool_sharding
        divided = jax.tree.map(lambda x: self._shape(x.shape, x.dtype, place), pool)
        return _Arrays(divided, *tables)

    def _shape(
        self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None = None
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self._sharding)

    def _put(self, array: np.ndarray | np.integer) -> jax.Array:
        return jax.device_put(array, self._sharding)

    # Launching

    def read(self, steps: Listing[Step], prompt_logprobs: Container[Sequence] = ()) -> Reading:
        """Begins to read the rows of a step, once all before is launched.

        Args:
            steps: the step of each lane; those that have a chunk have the same.
            prompt_logprobs: sequences whose prompts' tokens get their log-probabilities.
        """
        self._launcher.wait()
        assert self._arrays is not None
        self._set_pages([page for step in steps for page in step.new_pages])
        shape = self.shapes.row(
            max(len(step.decoding) for step in steps),
            next((step.chunk for step in steps if step.chunk), None),
            max(len(step.samples) for step in steps),
            any(piece.sequence in prompt_logprobs for step in steps for piece in step.pieces),
            all(piece.start == 0 for step in steps for piece in step.pieces),
        )
        integers_RK = self._put(pack_rows(shape, steps, self._nobody))
        return Reading(shape, self._launcher.submit(self._read_rows, shape, integers_RK))

    def _read_rows(self, shape: RowShape, integers_RK: jax.Array) -> Row:
        assert self._arrays is not None
        pool, tables = self._arrays.pool, (self._arrays.newest_S, self._arrays.table_SP)
        if self._host_reader is None:
            logits_MW, logprobs, pool = self.program(shape)(
                self._leaves, pool, *tables, self._known_W, integers_RK
            )
        else:
            logits_MW, logprobs, pool = self._host_reader.read(
                shape, pool, Tables(*tables, integers_RK), self._known_W
            )
        self._arrays = self._arrays._replace(pool=pool)
        if logprobs is not None:
            copy_to_host(logprobs)
        return Row(logits_MW, logprobs)

    def choose(
        self,
        reading: Reading,
        sequences: Listing[Sequence],
        choices: Listing[Choice],
        places: Listing[int],
    ) -> Future[Chosen]:
        """Begins to choose next tokens, once the rows that they follow are launched.

        Args:
            reading: what `read` gave.
            sequences: whose tokens.
            choices: how each is chosen.
            places: of each among the logits wanted.
        """
        asked = ChoiceShape(
            reading.shape.num_rows * reading.shape.num_wanted,
            draws=any(choice.draws for choice in choices),
            limits=any(choice.limits for choice in choices),
            changes=any(choice.changes for choice in choices),
            logprobs=any(choice.logprobs for choice in choices),
        )
        shape = self.shapes.choice(asked)
        packed = self._packed(shape, sequences, choices, places)  # before the choices change

        def launch() -> Chosen:
            return self._choose(shape, reading.row.result().logits_MW, *packed)

        return self._launcher.submit(launch)

    def _packed(
        self,
        shape: ChoiceShape,
        sequences: Listing[Sequence] = (),
        choices: Listing[Choice] = (),
        places: Listing[int] = (),
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        packed_MK = pack_choices(shape, sequences, choices, places, self._nobody)
        if not shape.changes:
            return packed_MK, None
        return packed_MK, pack_changes(shape.num_wanted, self._vocab_size, choices, places)

    def _choose(
        self,
        shape: ChoiceShape,
        logits_MW: jax.Array,
        packed_MK: np.ndarray,
        changes: tuple[np.ndarray, ...] | None,
    ) -> Chosen:
        assert self._arrays is not None
        counts = self._counts() if shape.changes else None
        tokens_M, logprobs, newest_S, counts = self.program(shape)(
            logits_MW,
            self._arrays.newest_S,
            self._known_W,
            self._put_choices(packed_MK),
            counts,
            None if changes is None else tuple(map(self._put, changes)),
        )
        self._arrays = self._arrays._replace(newest_S=newest_S)
        if counts is not None:
            self._arrays = self._arrays._replace(counts_SW=counts)
        copy_to_host((tokens_M, logprobs))
        # The next row's get their place: a CUDA graph whose arrays have moved is written anew.
        logits_MW.delete()
        return Chosen(tokens_M, logprobs)

    def set_counts(self, slot: int, prompt: Listing[int], text: Listing[int]) -> None:
        """Counts a sequence's tokens, before the first choice that depends on them."""
        self._launcher.wait()
        assert self._arrays is not None
        row_W = 2 * np.bincount(text, minlength=self._vocab_size).astype(np.int32)
        row_W[np.asarray(prompt)] |= 1
        run = self.program("counts")
        counts = run(self._counts(), self._put(np.int32(slot)), self._put(row_W))
        self._arrays = self._arrays._replace(counts_SW=counts)

    def _counts(self) -> jax.Array:
        """Returns the counts of all slots, allocated when they are needed first."""
        assert self._arrays is not None
        if self._arrays.counts_SW is None:
            shape = self._counts_shape()
            counts = self._put(np.zeros(shape.shape, shape.dtype))  # compiles nothing
            self._arrays = self._arrays._replace(counts_SW=counts)
        assert self._arrays.counts_SW is not None
        return self._arrays.counts_SW

    def _counts_shape(self) -> jax.ShapeDtypeStruct:
        return self._shape((self._nobody + 1, self._vocab_size), jnp.int32)

    def _set_pages(self, new_pages: Listing[tuple[int, int, int]]) -> None:
        assert self._arrays is not None
        table_SP = self._arrays.table_SP
        for start in range(0, len(new_pages), programs.TABLE_UPDATES):
            entries = np.full((3, programs.TABLE_UPDATES), table_SP.shape[0], np.int32)
            some = new_pages[start : start + programs.TABLE_UPDATES]
            entries[:, : len(some)] = np.asarray(some, np.int32).T
            table_SP = self.program("pages")(table_SP, self._put(entries))
        self._arrays = self._arrays._replace(table_SP=table_SP)

    # Programs

    def warm_up(self) -> None:
        """Compiles every program, several at a time, and runs it; none is compiled after."""
        keys: list[_ProgramKey] = [*self.shapes.choices(), "pages", "counts"]
        if self._host_reader is None:
            keys += self.shapes.rows()
        else:
            arrays, known = self._shapes, self._shape((self._vocab_size,), bool)
            tables = Tables(arrays.newest_S, arrays.table_SP, None)
            self._host_reader.warm_up(self.shapes.rows(), arrays.pool, tables, known)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(self.program, keys))
        self._run_all()

    def _run_all(self) -> None:
        """Runs every program on nobody's tokens: on a GPU the first run took up to 0.8 s."""
        if self._host_reader is None:
            for rows in self.shapes.rows():
                nothing = Step([], [], rows.chunk, [], [], [])
                packed = pack_rows(rows, [nothing] * self._num_lanes, self._nobody)
                self._read_rows(rows, self._put(packed))
        for shape in self.shapes.choices():
            wide = (shape.num_wanted, self._vocab_size)
            logits_MW = jnp.zeros(wide, jnp.float32, device=self._logits_sharding)
            self._choose(shape, logits_MW, *self._packed(shape))
        assert self._arrays is not None
        self._set_pages([(self._nobody + 1, 0, 0)])  # a place past the table's end: nothing is set
        self.set_counts(self._nobody, [0], [])
        # What counts tokens is allocated when it is needed.
        self._arrays = self._arrays._replace(counts_SW=None)
        jax.block_until_ready(self._arrays)

    def program(self, key: _ProgramKey) -> Any:
        """Returns a program, compiled when it is needed first."""
        if key not in self._programs:
            places: Any = self._sharding
            quantised = unrolled = False
            if isinstance(key, RowShape):
                quantised = are_quantised(self._leaves)
                places = (self._logits_sharding, self._sharding, self._pool_sharding)
                unrolled = self._unrolls and key.chunk is None
            spelling = f"{self._spelling} {key}"
            self._programs[key] = compiled(
                *self._to_compile(key),
                places,
                quantised=quantised,
                unrolled=unrolled,
                spelling=spelling,
            )
        return self._programs[key]

    def _to_compile(self, key: _ProgramKey) -> _ToCompile:
        """Returns what `compiled` takes for a program."""
        arrays, known = self._shapes, self._shape((self._vocab_size,), bool)
        if isinstance(key, RowShape):
            integers_RK = self._shape((key.num_rows, key.num_integers), jnp.int32)
            tables = (arrays.pool, arrays.newest_S, arrays.table_SP)
            return (
                programs.read_row,
                (self._key, key),
                (self._leaves, *tables, known, integers_RK),
                (1,),
            )
        if isinstance(key, ChoiceShape):
            size = key.num_wanted
            wide = (size, self._vocab_size)
            logits_MW = self._shape(wide, jnp.float32, self._logits_sharding)
            packed_MK = self._shape((size, PACKED_SIZE + 1), jnp.uint32)
            counts = changes = None
            if key.changes:
                counts = self._counts_shape()
                host = LogitChanges.host_arrays(size, self._vocab_size)
                changes = tuple(self._shape(array.shape, array.dtype) for array in host)
            arguments = (logits_MW, arrays.newest_S, known, packed_MK, counts, changes)
            return programs.choose_tokens, (key,), arguments, (1, 4) if key.changes else (1,)
        if key == "pages":
            entries = self._shape((3, programs.TABLE_UPDATES), jnp.int32)
            return programs.set_pages, (), (arrays.table_SP, entries), (0,)
        row_W = self._shape((self._vocab_size,), jnp.int32)
        slot = self._shape((), jnp.int32)
        return programs.set_counts, (), (self._counts_shape(), slot, row_W), (0,)


# A function, its static arguments, its arrays, and the places of those that it overwrites.
_ToCompile = tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], tuple[int, ...]]
_ProgramKey = RowShape | ChoiceShape | Literal["pages", "counts"]


class _Arrays(NamedTuple):
    """What the device keeps from step to step, the weights apart."""

    pool: LatentPool
    newest_S: jax.Array
    table_SP: jax.Array
    counts_SW: jax.Array | None = None
