"""What breaks in training, put into every place where it can: what is left must be right, bit for bit.

`harness` has the injector and the state that is compared, `cases` the variants and the ways of stepping. A new way of
stepping is one more entry of `cases.PATHS`; all tests marked `every_case` then run it, too. The counts are printed at
the end of a run. `-m slow` adds all variants with all ways of stepping, every line instead of some, and the
numbers of signals and kills in brackets.

| fault | expected | test |
|---|---|---|
| an error, Ctrl-C, SIGTERM, out of memory, full disk at 9 points | the states as before, or after | test_grid |
| Ctrl-C at a line of the package | the same | test_every_line; tests/test_edges |
| half an update of the base | what the base alone leaves | test_odd_models |
| SIGKILL in a step | a whole checkpoint, of the last step saved | test_kills |
| SIGKILL while saving (200), power cut | one of the last two, whole | test_kills; damage: tests/test_checkpoint |
| two commands with one output; SIGKILL in a command | one is refused; nothing is lost | test_commands |
| NaN, inf in either pass | no update, counted; "raise"; "ignore" | test_nonfinite: also each parameter, 4 dtypes |
| a loss that is not finite, gradients that are | reported | test_nonfinite; in a run: tests/test_train |
| signals to a training run (200) | saved, 130 or 143, goes on; a second ends it | test_stops; tests/test_train |
| a checkpoint from a signal handler (every line, random times) | clean weights, buffers | test_signals |
| copy, pickle, evaluation while perturbed | refused, refused, a warning | test_signals; tests/test_edges |
| a full disk | old files stay, path and bytes are named, --resume goes on | test_disk |
| stopping at each of 20 steps, 2 bases, with GradScaler (80) | no bit differs | test_resume; tests/test_train |
| what a checkpoint holds | the base's state, 2 kB at most; loads others' | test_resume; tests/test_foreign |
| GradScaler overflow in each pass of each iteration | as unscaled training without that update | test_scaler |
| a closure through GradScaler.step | an error with the remedy | tests/test_optimizers |
| a gradient in one pass only | moved by the first, updated by the second | test_odd_models, tests/test_perturbation |
| zero gradients, bare step() | a step of the base | test_odd_models; tests/test_optimizers, test_kernels |
| frozen, unfrozen, added parameters | as torch | tests/test_edges, test_optimizers |
| tied, shared, listed twice | moved once; by both; once | test_odd_models; tests/test_edges, test_torch_contract |
| 0-d, empty, strided, channels_last | the formula in float64 | tests/test_parameter_sets |
| complex | pairs of real numbers | tests/test_kernels, test_edges |
| bf16, fp16 weights | come back exactly (10,000 steps); loss is said | test_odd_models; tests/test_perturbation |
| gradients too large or small for fp16 | one norm, in float64 | tests/test_kernels |
| mixed dtypes | one norm | test_odd_models |
| sparse gradients | as dense ones | test_odd_models; tests/test_kernels |
| one autocast region around both passes | as two regions | tests/test_perturbation |
| draws | as 1 or 2 forward passes, nothing else | test_odd_models; tests/test_perturbation |
| buffers of all kinds, 60 steps | those of the first passes | test_odd_models; tests/test_edges |
| storage, 1,000 steps | data_ptr constant | test_odd_models; tests/test_invariants |
| two threads, two optimizers on one model | independent; one is refused | test_odd_models; tests/test_perturbation |
"""
