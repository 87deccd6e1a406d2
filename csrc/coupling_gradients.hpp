// Gradients of `couple` in one pass, and a pass that also computes its inverse.
#pragma once

#include "couplings.hpp"

namespace usf {

// Gradients of an exit's scale and bias: the sums of grad_y * coupled x and of grad_y. There is one part per
// stretch (for maps, per image).
struct ExitSums {
    std::int64_t channels = 0;
    std::vector<float> scale, bias;  // [parts, channels]

    void make(std::int64_t parts, std::int64_t n) {
        channels = n;
        scale.assign(parts * n, 0.0f);
        bias.assign(parts * n, 0.0f);
    }
    void finish(float* grad_scale, float* grad_bias) const {
        const std::int64_t parts = channels == 0 ? 0 : static_cast<std::int64_t>(bias.size()) / channels;
        std::vector<double> totals(2 * channels);
        for (std::int64_t part = 0; part < parts; ++part) {
            for (std::int64_t j = 0; j < channels; ++j) {
                totals[2 * j] += scale[part * channels + j];
                totals[2 * j + 1] += bias[part * channels + j];
            }
        }
        for (std::int64_t j = 0; j < channels; ++j) {
            grad_scale[j] = static_cast<float>(totals[2 * j]);
            grad_bias[j] = static_cast<float>(totals[2 * j + 1]);
        }
    }
};

// Gradient of a plane of active or passive values, see `gradient_of_piece`. If `scale` is given, also sums
// grad_y times the coupled x, and grad_y. `params` is null for passive values.
USF_CLONES inline void gradient_of_plane(const Coupling& coupling, bool active, const float* grad_y,
                                         const float* scale, const float* x, const float* params,
                                         std::int64_t apart, std::int64_t n, float grad_log_det,
                                         float* grad_x, float* grad_params, float* scale_sum,
                                         float* bias_sum) {
    double scale_total = 0, bias_total = 0;
    for (std::int64_t first = 0; first < n; first += piece) {
        const int count = static_cast<int>(std::min<std::int64_t>(piece, n - first));
        float grad[piece], coupled[piece];
        const float *from = grad_y + first, *through = from, *value = x + first;
        if (scale) {
            const float factor = *scale;
            for (int j = 0; j < count; ++j) grad[j] = factor * from[j];
            bias_total += sum(from, count);
            through = grad;
        }
        if (active) {
            // It reads its inputs before it writes: the gradient of x may overwrite grad_y.
            gradient_of_piece(coupling, through, value, params + first, apart, count, grad_log_det,
                              grad_x + first, grad_params + first, scale ? coupled : nullptr);
            value = coupled;
        } else if (grad_x + first != through) {
            std::copy_n(through, count, grad_x + first);
        }
        if (scale) {
            for (int j = 0; j < count; ++j) coupled[j] = value[j] * from[j];
            scale_total += sum(coupled, count);
        }
    }
    if (scale) {
        *scale_sum = static_cast<float>(scale_total);
        *bias_sum = static_cast<float>(bias_total);
    }
}

// Gradient of rows of neighbouring channels. Adds to the sums.
USF_CLONES inline void gradient_of_rows(const Coupling& coupling, std::int64_t split, std::int64_t channels,
                                        const Exit& exit, const float* grad_y, std::int64_t grad_row,
                                        const float* x, std::int64_t x_row, const float* params,
                                        std::int64_t params_row, std::int64_t apart, std::int64_t rows,
                                        const float* grad_log_det, std::int64_t step, float* grad_x,
                                        std::int64_t grad_x_row, float* grad_params,
                                        std::int64_t grad_params_row, float* __restrict scale_sum,
                                        float* __restrict bias_sum, float* __restrict scratch) {
    const float* __restrict const scale = exit.scale;
    for (std::int64_t r = 0; r < rows; ++r) {
        const float* from = grad_y + r * grad_row;
        if (!exit.to.empty()) {
            exit.take(from, channels, scratch);
            from = scratch;
        }
        const float* const value = x + r * x_row;
        for (std::int64_t first = 0; first < channels;) {
            const bool active = first >= split;
            const std::int64_t end = active ? channels : split;
            const int count = static_cast<int>(std::min<std::int64_t>(piece, end - first));
            float grad[piece], coupled[piece];
            const float *through = from + first, *passed = value + first;
            if (scale) {
                for (int j = 0; j < count; ++j) grad[j] = scale[first + j] * from[first + j];
                for (int j = 0; j < count; ++j) bias_sum[first + j] += from[first + j];
                through = grad;
            }
            float* const to = grad_x + r * grad_x_row + first;
            if (active) {
                gradient_of_piece(coupling, through, passed, params + r * params_row + first - split, apart,
                                  count, grad_log_det ? grad_log_det[r * step] : 0.0f, to,
                                  grad_params + r * grad_params_row + first - split,
                                  scale ? coupled : nullptr);
                passed = coupled;
            } else if (to != through) {
                std::copy_n(through, count, to);
            }
            if (scale)
                for (int j = 0; j < count; ++j) scale_sum[first + j] += passed[j] * from[first + j];
            first += count;
        }
    }
}

// Gradients of x, params and, if the exit has them, of scale and bias. Without an exit, grad_x may be grad_y
// itself. `grad_log_det` [batch] is read for affine couplings only.
inline bool couple_gradient(const Coupling& coupling, std::int64_t split, const Exit& exit,
                            const Input& grad_y, const float* grad_log_det, const Input& x,
                            const Input& params, const Extent& extent, const Output& grad_x,
                            const Output& grad_params, float* grad_scale, float* grad_bias, int threads) {
    const auto [batch, channels, positions] = extent;
    const Layout layout = common_layout(positions, grad_y, x, params, grad_x, grad_params);
    const std::int64_t apart = (channels - split) * params.channel;
    // The loops use one distance `apart` for both params and their gradient.
    if (layout == Layout::other || params.channel != grad_params.channel) return false;
    ExitSums sums;
    if (layout == Layout::maps) {
        if (exit.scale) sums.make(batch, channels);
        const Stretches planes(channels, positions);
        team_for(batch * planes.count, threads,
                 [&, channels = channels, positions = positions](std::int64_t i) {
                     const std::int64_t image = i / planes.count, s = i % planes.count;
                     for (std::int64_t j = planes.begin(s); j < planes.end(s); ++j) {
                         const bool active = j >= split;
                         const std::int64_t to = exit.channel(j), at = image * channels + j;
                         gradient_of_plane(
                             coupling, active, grad_y.at(image, to, 0), exit.scale ? exit.scale + j : nullptr,
                             x.at(image, j, 0), active ? params.at(image, j - split, 0) : nullptr, apart,
                             positions, coupling.affine() ? grad_log_det[image] : 0, grad_x.at(image, j, 0),
                             active ? grad_params.at(image, j - split, 0) : nullptr,
                             exit.scale ? &sums.scale[at] : nullptr, exit.scale ? &sums.bias[at] : nullptr);
                     }
                 });
    } else {
        const RowCount count(extent);
        const RowsOf<const float> grad_rows(grad_y, positions), x_rows(x, positions),
            params_rows(params, positions);
        const RowsOf<float> grad_x_rows(grad_x, positions), grad_params_rows(grad_params, positions);
        const Stretches rows(count.rows, channels, rows_of_a_sum);
        const bool own = positions == 1;
        if (exit.scale) sums.make(count.images * rows.count, channels);
        team_for(count.images * rows.count, threads, [&, channels = channels](std::int64_t i) {
            const std::int64_t image = i / rows.count, begin = rows.begin(i % rows.count);
            std::vector<float> scratch(exit.to.size());
            gradient_of_rows(coupling, split, channels, exit, grad_rows.at(image, begin), grad_rows.row,
                             x_rows.at(image, begin), x_rows.row, params_rows.at(image, begin),
                             params_rows.row, apart, rows.end(i % rows.count) - begin,
                             coupling.affine() ? grad_log_det + (own ? begin : image) : nullptr, own,
                             grad_x_rows.at(image, begin), grad_x_rows.row, grad_params_rows.at(image, begin),
                             grad_params_rows.row, exit.scale ? &sums.scale[i * channels] : nullptr,
                             exit.scale ? &sums.bias[i * channels] : nullptr, scratch.data());
        });
    }
    if (exit.scale) sums.finish(grad_scale, grad_bias);
    return true;
}

// Takes a plane of passive or active values back through the exit and the coupling: see `undo_piece`.
USF_CLONES inline void undo_plane(const Coupling& coupling, bool active, const float* y, const float* grad_y,
                                  const float* scale, const float* bias, const float* params,
                                  std::int64_t apart, std::int64_t n, float grad_log_det, float* x,
                                  float* grad_x, float* grad_params, float* scale_sum, float* bias_sum) {
    if (!active && !scale && x == y && grad_x == grad_y) return;
    double scale_total = 0, bias_total = 0;
    for (std::int64_t first = 0; first < n; first += piece) {
        const int count = static_cast<int>(std::min<std::int64_t>(piece, n - first));
        const float* const from = grad_y + first;
        float value[piece], grad[piece];
        std::copy_n(y + first, count, value);
        std::copy_n(from, count, grad);
        if (scale) {
            const float factor = *scale, offset = *bias;
            for (int j = 0; j < count; ++j) value[j] = (value[j] - offset) / factor;
            for (int j = 0; j < count; ++j) grad[j] = value[j] * from[j];
            scale_total += sum(grad, count);
            bias_total += sum(from, count);
            for (int j = 0; j < count; ++j) grad[j] = factor * from[j];
        }
        if (active)
            undo_piece(coupling, value, grad, params + first, apart, count, grad_log_det,
                       grad_params + first);
        std::copy_n(value, count, x + first);
        std::copy_n(grad, count, grad_x + first);
    }
    if (scale) {
        *scale_sum = static_cast<float>(scale_total);
        *bias_sum = static_cast<float>(bias_total);
    }
}

// Does the same for one row of neighbouring channels. Adds to the sums. `scratch` holds two rows.
USF_CLONES inline void undo_row(const Coupling& coupling, std::int64_t split, std::int64_t channels,
                                const Exit& exit, const float* y, const float* grad_y, const float* params,
                                std::int64_t apart, float grad_log_det, float* x, float* grad_x,
                                float* grad_params, float* __restrict scale_sum, float* __restrict bias_sum,
                                float* __restrict scratch) {
    if (!exit.nothing()) {
        float* __restrict const value = scratch;
        float* __restrict const grad = scratch + channels;
        exit.take(y, channels, value);
        exit.take(grad_y, channels, grad);
        if (exit.scale) {
            const float* __restrict scale = exit.scale;
            const float* __restrict bias = exit.bias;
            for (std::int64_t j = 0; j < channels; ++j) {
                value[j] = (value[j] - bias[j]) / scale[j];
                scale_sum[j] += value[j] * grad[j];
                bias_sum[j] += grad[j];
                grad[j] *= scale[j];
            }
        }
        y = value;
        grad_y = grad;
    }
    if (x != y) std::copy_n(y, channels, x);
    if (grad_x != grad_y) std::copy_n(grad_y, channels, grad_x);
    for (std::int64_t j = split; j < channels; j += piece) {
        const int count = static_cast<int>(std::min<std::int64_t>(piece, channels - j));
        undo_piece(coupling, x + j, grad_x + j, params + j - split, apart, count, grad_log_det,
                   grad_params + j - split);
    }
}

// A step of a reversible backward pass: recovers x from y = couple(x), and computes the gradients like
// `couple_gradient`. Without an exit, x and grad_x may be y and grad_y themselves.
inline bool uncouple(const Coupling& coupling, std::int64_t split, const Exit& exit, const Input& y,
                     const Input& grad_y, const Input& params, const float* grad_log_det,
                     const Extent& extent, const Output& x, const Output& grad_x, const Output& grad_params,
                     float* grad_scale, float* grad_bias, int threads) {
    const auto [batch, channels, positions] = extent;
    const Layout layout = common_layout(positions, y, grad_y, params, x, grad_x, grad_params);
    if (layout == Layout::other || params.channel != grad_params.channel) return false;
    const std::int64_t apart = (channels - split) * params.channel;
    const auto of_log_det = [&](std::int64_t image) { return coupling.affine() ? grad_log_det[image] : 0; };
    ExitSums sums;
    if (layout == Layout::maps) {
        if (exit.scale) sums.make(batch, channels);
        const Stretches planes(channels, positions);
        team_for(
            batch * planes.count, threads, [&, channels = channels, positions = positions](std::int64_t i) {
                const std::int64_t image = i / planes.count, s = i % planes.count;
                for (std::int64_t j = planes.begin(s); j < planes.end(s); ++j) {
                    const bool active = j >= split;
                    const std::int64_t from = exit.channel(j), at = image * channels + j;
                    undo_plane(coupling, active, y.at(image, from, 0), grad_y.at(image, from, 0),
                               exit.scale ? exit.scale + j : nullptr, exit.scale ? exit.bias + j : nullptr,
                               active ? params.at(image, j - split, 0) : nullptr, apart, positions,
                               of_log_det(image), x.at(image, j, 0), grad_x.at(image, j, 0),
                               active ? grad_params.at(image, j - split, 0) : nullptr,
                               exit.scale ? &sums.scale[at] : nullptr, exit.scale ? &sums.bias[at] : nullptr);
                }
            });
    } else {
        const Stretches rows(batch * positions, channels, rows_of_a_sum);
        if (exit.scale) sums.make(rows.count, channels);
        team_for(rows.count, threads, [&, channels = channels, positions = positions](std::int64_t i) {
            std::vector<float> scratch(exit.nothing() ? 0 : 2 * channels);
            for (std::int64_t r = rows.begin(i); r < rows.end(i); ++r) {
                const std::int64_t image = r / positions, p = r % positions;
                undo_row(coupling, split, channels, exit, y.at(image, 0, p), grad_y.at(image, 0, p),
                         params.at(image, 0, p), apart, of_log_det(image), x.at(image, 0, p),
                         grad_x.at(image, 0, p), grad_params.at(image, 0, p),
                         exit.scale ? &sums.scale[i * channels] : nullptr,
                         exit.scale ? &sums.bias[i * channels] : nullptr, scratch.data());
            }
        });
    }
    if (exit.scale) sums.finish(grad_scale, grad_bias);
    return true;
}

}  // namespace usf
