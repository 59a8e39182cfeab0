// Kernels of adamw.cpp, one instruction set. See each_isa.h.

// Sixteen values of everything; the new weights.
VMAE2_INLINE Floats adamw_lanes(Floats param, Floats grad, Floats& exp_avg, Floats& exp_avg_sq, const AdamWNumbers& n) {
  grad = grad * splat(n.scale);
  exp_avg = exp_avg + splat(n.one) * (grad - exp_avg);
  exp_avg_sq = splat(n.second) * exp_avg_sq + splat(n.two) * (grad * grad);
  const Floats size = square_root(exp_avg_sq) * splat(n.root) + splat(n.eps);
  return splat(n.keep) * param - splat(n.step) * (exp_avg / size);
}

void adamw_update(const AdamWTensor& t, const AdamWNumbers& n) {
  auto* shadow = reinterpret_cast<bf16*>(t.shadow);
  int64_t i = 0;
  for (; i + 16 <= t.count; i += 16) {
    Floats first = load16(t.exp_avg + i), second = load16(t.exp_avg_sq + i);
    const Floats param = adamw_lanes(load16(t.param + i), load16(t.grad + i), first, second, n);
    store16(t.exp_avg + i, first);
    store16(t.exp_avg_sq + i, second);
    store16(t.param + i, param);
    if (shadow != nullptr) store16(shadow + i, param);
  }
  if (const int64_t left = t.count - i; left > 0) {
    Floats first = load_first(t.exp_avg + i, left), second = load_first(t.exp_avg_sq + i, left);
    const Floats param = adamw_lanes(load_first(t.param + i, left), load_first(t.grad + i, left), first, second, n);
    store_first(t.exp_avg + i, first, left);
    store_first(t.exp_avg_sq + i, second, left);
    store_first(t.param + i, param, left);
    if (shadow != nullptr) store_first(shadow + i, param, left);
  }
}

// The weights as they are, rounded.
void adamw_shadow(const AdamWTensor& t) {
  auto* shadow = reinterpret_cast<bf16*>(t.shadow);
  int64_t i = 0;
  for (; i + 16 <= t.count; i += 16) store16(shadow + i, load16(t.param + i));
  if (i < t.count) store_first(shadow + i, load_first(t.param + i, t.count - i), t.count - i);
}
