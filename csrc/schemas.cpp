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
  m.def(
      "sample_masks(Tensor sample_ids, int seed, int epoch, int num_patches) "
      "-> (Tensor, Tensor)");
  m.def(
      "gather_patches(Tensor imgs, Tensor ids, int patch_size, Tensor? scale, Tensor? shift, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "patch_loss(Tensor pred, Tensor imgs, Tensor ids, int patch_size, bool norm_pix, "
      "Tensor? teacher_pred, float gamma, Tensor? scale, Tensor? shift) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "feature_loss(Tensor pred, Tensor target, Tensor? ids, bool normalize, Tensor? weight, "
      "Tensor? bias, str kind, float beta) -> (Tensor, Tensor)");
  m.def(
      "restore_tokens(Tensor x, Tensor mask_token, Tensor ids_shuffle, Tensor ids_restore, "
      "Tensor pos_embed) -> Tensor");
  m.def(
      "restore_tokens_backward(Tensor grad, Tensor ids_shuffle, int num_visible) "
      "-> (Tensor, Tensor)");
  m.def("attention(Tensor qkv, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor");
  m.def("attention_queries(Tensor q, Tensor kv, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_queries_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_varlen(Tensor qkv, Tensor cu_seqlens, int max_seqlen, float scale) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_varlen_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, "
      "Tensor cu_seqlens, int max_seqlen, float scale) -> Tensor");
  m.def(
      "norm(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, ScalarType dtype) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor mean, Tensor rstd, "
      "Tensor weight) -> (Tensor, Tensor, Tensor)");
  m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}
