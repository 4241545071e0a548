// The compiled operators torch.ops.fastmim_native.*, whichever devices they were built for.
//
// Internal: fastmim/ops declares the public torch.ops.fastmim.*, with the same arguments, and calls
// these.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastmim_native, m) {
  m.def(
      "ema_update_(Tensor(a!)[] teachers, Tensor[] students, Tensor(b!)[] teacher_remainders, "
      "Tensor[] student_remainders, Tensor(c!)[] teacher_copies, Tensor momentum, Tensor skip) "
      "-> ()");
  m.def(
      "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] teachers, Tensor(e!)[] param_remainders, "
      "Tensor(f!)[] teacher_remainders, Tensor(g!)[] param_copies, Tensor(h!)[] teacher_copies, "
      "Tensor(i!) step, Tensor lr, Tensor momentum, Tensor grad_scale, Tensor clip, Tensor skip, "
      "Tensor weight_decay, float beta1, float beta2, float eps) -> ()");
  m.def("gather_tokens(Tensor x, Tensor ids) -> Tensor");
  m.def("scatter_tokens(Tensor x, Tensor ids, int num_tokens) -> Tensor");
}
