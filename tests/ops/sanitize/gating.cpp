#include "gating.h"

#include <cmath>
#include <cstdint>
#include <memory>

#include "check.h"

namespace {

// Memory of exactly the asked size.
struct Array {
  std::unique_ptr<float[]> memory;
  int64_t size;
  explicit Array(int64_t n, float from = 0, float step = 0) : memory(new float[n]), size(n) {
    for (int64_t i = 0; i < n; ++i) memory[i] = from + step * float(i % 17);
  }
  float* get() const { return memory.get(); }
  bool finite() const {
    for (int64_t i = 0; i < size; ++i)
      if (!std::isfinite(memory[i])) return false;
    return true;
  }
};

bool network(vamoh::Isa isa, int threads, int64_t n, std::vector<int64_t> widths, int64_t channels, bool shared,
             bool bounded) {
  const int64_t batch = 3, hidden = widths[0], components = widths.back();
  const int64_t sets = shared ? 1 : batch;
  const Array coords(sets * hidden * n, -0.5f, 0.1f);
  const Array shift(batch * hidden, -0.4f, 0.06f), values(batch * n * channels, 0, 0.06f);
  int64_t count = hidden * channels;
  for (size_t l = 0; l + 1 < widths.size(); ++l) count += widths[l + 1] * (widths[l] + 1);
  const Array parameters(count, -0.4f, 0.05f);
  const vamoh::GatingNet net{coords.get(),     shared, shift.get(), channels ? values.get() : nullptr,
                             parameters.get(), widths, batch,       n,
                             channels,         0.1f,   bounded};
  const Array log_p(batch * components * n), grad(log_p.size, -1, 0.2f);
  const Array grad_coords(coords.size), grad_shift(shift.size), grad_values(values.size), grad_parameters(count);
  vamoh::gating(net, log_p.get(), threads, isa);
  vamoh::gating_backward(
      net, log_p.get(), grad.get(),
      {grad_coords.get(), grad_shift.get(), channels ? grad_values.get() : nullptr, grad_parameters.get()}, threads,
      isa);
  return log_p.finite() && grad_coords.finite() && grad_shift.finite() && grad_values.finite() &&
         grad_parameters.finite();
}

bool divergence(vamoh::Isa isa, int threads, int64_t n, bool uniform) {
  const int64_t batch = 2, components = 3, size = batch * components * n;
  const Array log_q(size, -3, 0.1f), log_p(uniform ? batch * components : size, -2, 0.05f), q(size), kl(batch);
  std::unique_ptr<bool[]> mask(new bool[batch * n]);
  for (int64_t i = 0; i < batch * n; ++i) mask[i] = i % 3 != 0;
  const Array grad_q(size, -1, 0.1f), grad_kl(batch, 1), grad_log_q(size), grad_log_p(size);
  bool good = true;
  for (const bool* observed : {static_cast<const bool*>(nullptr), static_cast<const bool*>(mask.get())}) {
    vamoh::categorical_kl(log_q.get(), log_p.get(), uniform, observed, n, q.get(), kl.get(), batch, components, n,
                          threads, isa);
    vamoh::categorical_kl_backward(grad_q.get(), grad_kl.get(), q.get(), log_q.get(), log_p.get(), uniform,
                                   grad_log_q.get(), grad_log_p.get(), batch, components, n, threads, isa);
    good &= q.finite() && kl.finite() && grad_log_q.finite() && grad_log_p.finite();
  }
  return good;
}

const Register gating([](vamoh::Isa isa, int threads) {
  bool good = true;
  for (int64_t n : {1, 7, 64, 65, 200})
    for (bool flag : {false, true}) {
      good &= network(isa, threads, n, {3}, 0, flag, true);
      good &= network(isa, threads, n, {6, 4}, 3, flag, false);
      good &= network(isa, threads, n, {17, 33, 1}, 1, flag, true);
      good &= divergence(isa, threads, n, flag);
    }
  return good && divergence(isa, threads, 5000, false);
});

}  // namespace
