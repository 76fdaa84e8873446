#include "../gating.h"

#include <algorithm>
#include <utility>

#include "../threads.h"
#include "memory.h"

namespace {

// A network as the kernels see it. A slot holds what one tile of points needs, in panels: the offsets, in floats, of
// the values, of every layer's input, of the gradient of every layer's output (grads_at[0]: the first layer's) and of
// spare rows.
struct GatingTile {
  const float* const* weights;
  const float* const* biases;
  const float* value_weight;
  const int64_t* widths;
  int64_t layers, channels;
  float slope;
  bool bounded;
  const int64_t* inputs_at;
  const int64_t* grads_at;
  int64_t values_at, spare_at, slot;
};

}  // namespace

#define VAMOH_KERNEL "../cpu/gating_cpu.inl"
#include "../simd/each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kTile = portable::kPanel;
constexpr int64_t kParts = 32;            // of a sum, added up in order; at most so many threads share the work
constexpr int64_t kSlotFloats = 3 << 15;  // of slots filled before their products are taken
constexpr int64_t kMostSlots = 12;
constexpr int64_t kKlPoints = 4096;  // of one task

struct Range {
  int64_t begin, end;
};

// The i-th of `parts` nearly equal parts of [0, total).
Range part_of(int64_t i, int64_t parts, int64_t total) { return {i * total / parts, (i + 1) * total / parts}; }

// Adds up parts [parts, size] in order.
void add_parts(const float* parts, int64_t count, int64_t size, float* out) {
  std::fill(out, out + size, 0.0f);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < size; ++j) out[j] += parts[i * size + j];
}

struct NetLayout {
  std::vector<const float*> weights, biases;
  std::vector<int64_t> inputs_at, grads_at;
  GatingTile tile;
  int64_t parameters;  // how many

  explicit NetLayout(const GatingNet& net) {
    const auto layers = static_cast<int64_t>(net.widths.size()) - 1;
    int64_t at = 0;
    const auto rows = [&](int64_t n) { return std::exchange(at, at + n * kTile); };
    const float* next = net.parameters + net.widths[0] * net.channels;
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t in = net.widths[l], out = net.widths[l + 1];
      weights.push_back(std::exchange(next, next + in * out));
      biases.push_back(std::exchange(next, next + out));
      inputs_at.push_back(rows(in));
    }
    parameters = next - net.parameters;
    inputs_at.push_back(0);
    for (int64_t width : net.widths) grads_at.push_back(rows(width));
    const int64_t values_at = rows(net.channels), spare_at = rows(std::max(2 * net.widths.back(), net.channels));
    tile = {weights.data(),
            biases.data(),
            net.parameters,
            net.widths.data(),
            layers,
            net.channels,
            net.slope,
            net.bounded,
            inputs_at.data(),
            grads_at.data(),
            values_at,
            spare_at,
            at};
  }
  NetLayout(const NetLayout&) = delete;
};

// The work is cut into items: some functions times some tiles of points. Coordinates shared by the functions need their
// gradient summed over them, so an item then has all functions.
struct Items {
  int64_t groups, tile_parts;

  explicit Items(const GatingNet& net) {
    groups = net.shared ? 1 : std::max<int64_t>(std::min(net.batch, kParts), 1);
    tile_parts = std::min(ceil_div(net.count, kTile), std::max<int64_t>(kParts / groups, 1));
  }
  int64_t count() const { return groups * tile_parts; }
};

}  // namespace

void gating(const GatingNet& net, float* log_p, int threads, Isa isa) {
  const NetLayout layout(net);
  const Items items(net);
  const int64_t hidden = net.widths[0], components = net.widths.back(), count = net.count;
  const int64_t scratch = layout.tile.slot + hidden * kTile;
  const Buffer<float> memory = allocate<float>(std::max(threads, 1) * scratch);
  ThreadPool::get().run(items.count(), threads, [&](int64_t item, int worker) {
    float *coords = memory.get() + worker * scratch, *slot = coords + hidden * kTile;
    const Range functions = part_of(item / items.tile_parts, items.groups, net.batch);
    const Range tiles = part_of(item % items.tile_parts, items.tile_parts, ceil_div(count, kTile));
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const int64_t n = t * kTile, here = std::min(kTile, count - n);
      if (net.shared) VAMOH_DISPATCH(isa, load_rows)(net.coords + n, count, hidden, here, coords);
      for (int64_t b = functions.begin; b < functions.end; ++b) {
        if (!net.shared)
          VAMOH_DISPATCH(isa, load_rows)(net.coords + b * hidden * count + n, count, hidden, here, coords);
        VAMOH_DISPATCH(isa, gating_tile)(layout.tile, coords, net.shift + b * hidden,
                                         net.values + (b * count + n) * net.channels, here,
                                         log_p + b * components * count + n, count, slot);
      }
    }
  });
}

void gating_backward(const GatingNet& net, const float* log_p, const float* grad, const GatingGrads& grads, int threads,
                     Isa isa) {
  const NetLayout layout(net);
  const Items items(net);
  const GatingTile& tile = layout.tile;
  const int64_t hidden = net.widths[0], components = net.widths.back(), count = net.count;
  const int64_t slots = std::min(std::max<int64_t>(kSlotFloats / tile.slot, 1), kMostSlots);
  const int64_t scratch = 2 * hidden * kTile + slots * tile.slot;
  const Buffer<float> memory = allocate<float>(std::max(threads, 1) * scratch);
  const Buffer<float> parameters = allocate<float>(items.count() * layout.parameters);
  const Buffer<float> shifts = allocate<float>(items.tile_parts * net.batch * hidden);
  ThreadPool::get().run(items.count(), threads, [&](int64_t item, int worker) {
    float *coords = memory.get() + worker * scratch, *grad_coords = coords + hidden * kTile;
    float *first_slot = grad_coords + hidden * kTile, *total = parameters.get() + item * layout.parameters;
    const int64_t tile_part = item % items.tile_parts;
    const Range functions = part_of(item / items.tile_parts, items.groups, net.batch);
    const Range tiles = part_of(tile_part, items.tile_parts, ceil_div(count, kTile));
    float* shift = shifts.get() + tile_part * net.batch * hidden;
    std::fill(total, total + layout.parameters, 0.0f);
    std::fill(shift + functions.begin * hidden, shift + functions.end * hidden, 0.0f);
    int64_t filled = 0;
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const int64_t n = t * kTile, here = std::min(kTile, count - n);
      const auto begin = [&](int64_t at) {
        VAMOH_DISPATCH(isa, load_rows)(net.coords + at, count, hidden, here, coords);
        std::fill(grad_coords, grad_coords + hidden * kTile, 0.0f);
      };
      const auto end = [&](int64_t at) {
        VAMOH_DISPATCH(isa, store_rows)(grad_coords, hidden, here, grads.coords + at, count);
      };
      if (net.shared) begin(n);
      for (int64_t b = functions.begin; b < functions.end; ++b) {
        const int64_t at = b * hidden * count + n;
        if (!net.shared) begin(at);
        const int64_t value = (b * count + n) * net.channels, out = b * components * count + n;
        VAMOH_DISPATCH(isa, gating_backward_tile)(tile, coords, net.shift + b * hidden, net.values + value, here,
                                                  log_p + out, grad + out, count, first_slot + filled * tile.slot,
                                                  grad_coords, shift + b * hidden,
                                                  grads.values ? grads.values + value : nullptr);
        if (++filled == slots) {
          VAMOH_DISPATCH(isa, gating_parameters)(tile, first_slot, filled, total);
          filled = 0;
        }
        if (!net.shared) end(at);
      }
      if (net.shared) end(n);
    }
    if (filled) VAMOH_DISPATCH(isa, gating_parameters)(tile, first_slot, filled, total);
  });
  add_parts(parameters.get(), items.count(), layout.parameters, grads.parameters);
  add_parts(shifts.get(), items.tile_parts, net.batch * hidden, grads.shift);
}

void categorical_kl(const float* log_q, const float* log_p, bool uniform, const bool* mask, int64_t mask_stride,
                    float* q, float* kl, int64_t batch, int64_t components, int64_t count, int threads, Isa isa) {
  const int64_t parts = ceil_div(count, kKlPoints), p_stride = uniform ? 1 : count;
  const Buffer<double> sums = allocate<double>(batch * parts);
  ThreadPool::get().run(batch * parts, threads, [&](int64_t task, int) {
    const int64_t b = task / parts, n = task % parts * kKlPoints, at = b * components * count + n;
    sums[task] = VAMOH_DISPATCH(isa, kl_rows)(log_q + at, log_p + (uniform ? b * components : at), uniform, p_stride,
                                              mask ? mask + b * mask_stride + n : nullptr, q + at, components,
                                              std::min(kKlPoints, count - n), count);
  });
  for (int64_t b = 0; b < batch; ++b) {
    double total = 0;
    for (int64_t i = 0; i < parts; ++i) total += sums[b * parts + i];
    kl[b] = static_cast<float>(total);
  }
}

void categorical_kl_backward(const float* grad_q, const float* grad_kl, const float* q, const float* log_q,
                             const float* log_p, bool uniform, float* grad_log_q, float* grad_log_p, int64_t batch,
                             int64_t components, int64_t count, int threads, Isa isa) {
  ThreadPool::get().run(batch * components, threads, [&](int64_t row, int) {
    const int64_t at = row * count;
    VAMOH_DISPATCH(isa, kl_grad_rows)(grad_q + at, grad_kl[row / components], q + at, log_q + at,
                                      log_p + (uniform ? row : at), uniform, grad_log_q + at, grad_log_p + at, count);
  });
}

}  // namespace vamoh
