// The arithmetic of couplings on runs of neighbouring values, in pieces that stay in the cache.
#pragma once

#include "features.hpp"
#include "rows.hpp"

namespace usf {

constexpr int piece = 256;  // values

// e^x - 1 within a few units in the last place, whether x is near 0 or not, for |x| <= 30.
USF_INLINE float fast_expm1(float x) {
    const auto [power, rest] = exponential(std::min(std::max(x, -30.0f), 30.0f));
    return power * rest + (power - 1);
}

// log_scale = clamp * tanh(raw / 10). With e = e^(raw / 5) - 1, the tanh is e / (e + 2).
USF_INLINE void log_scales(const float* raw, int n, float clamp, float* log_scale) {
    for (int j = 0; j < n; ++j) {
        const float e = fast_expm1(0.2f * raw[j]);
        log_scale[j] = clamp * (e / (e + 2));
    }
}
// Also computes the slope of the tanh, 4 (e + 1) / (e + 2)^2.
USF_INLINE void log_scales(const float* raw, int n, float clamp, float* log_scale, float* slope) {
    for (int j = 0; j < n; ++j) {
        const float e = fast_expm1(0.2f * raw[j]), inverse = 1 / (e + 2);
        log_scale[j] = clamp * (e * inverse);
        slope[j] = 4 * (e + 1) * inverse * inverse;
    }
}

// Kind of a coupling. With a clamp it is affine: `params` are raw scales, followed by raw shifts at a
// distance of `apart` elements. Without, they are shifts.
struct Coupling {
    static constexpr float none = -1;
    float clamp = none;  // or not negative: the smallest clamps are 0 in float32
    bool inverse = false;
    bool affine() const { return clamp >= 0; }
};

// Writes the coupled x to `out`. Returns the sum of the log scales.
USF_INLINE double couple_run(const Coupling& coupling, const float* x, const float* params,
                             std::int64_t apart, std::int64_t n, float* __restrict out) {
    if (!coupling.affine()) {
        const float sign = coupling.inverse ? -1.0f : 1.0f;
        for (std::int64_t j = 0; j < n; ++j) out[j] = x[j] + sign * params[j];
        return 0;
    }
    double total = 0;
    for (std::int64_t first = 0; first < n; first += piece) {
        const int count = static_cast<int>(std::min<std::int64_t>(piece, n - first));
        const float *from = x + first, *shift = params + apart + first;
        float* const to = out + first;
        float s[piece];
        log_scales(params + first, count, coupling.clamp, s);
        if (coupling.inverse)
            for (int j = 0; j < count; ++j) to[j] = (from[j] - 0.1f * shift[j]) * fast_exp(-s[j]);
        else
            for (int j = 0; j < count; ++j) to[j] = from[j] * fast_exp(s[j]) + 0.1f * shift[j];
        total += sum(s, count);
    }
    return total;
}

// Gradients of at most `piece` active values x and of their params, from the gradients of the coupled x,
// `grad`, and of the log-determinant. The coupled x is written to `coupled` if that is not null. The gradient
// of x may overwrite any input: all inputs are read before it is written.
USF_INLINE void gradient_of_piece(const Coupling& coupling, const float* grad, const float* x,
                                  const float* params, std::int64_t apart, int n, float grad_log_det,
                                  float* grad_x, float* grad_params, float* coupled) {
    const float sign = coupling.inverse ? -1.0f : 1.0f;
    if (!coupling.affine()) {
        float to[piece];
        for (int j = 0; j < n; ++j) to[j] = sign * grad[j];
        if (coupled)
            for (int j = 0; j < n; ++j) coupled[j] = x[j] + sign * params[j];
        if (grad_x != grad) std::copy_n(grad, n, grad_x);
        std::copy_n(to, n, grad_params);
        return;
    }
    const float *shift = params + apart, factor = 0.1f * coupling.clamp * sign;
    float s[piece], slope[piece], to_x[piece], to_scale[piece], to_shift[piece];
    log_scales(params, n, coupling.clamp, s, slope);
    if (coupling.inverse) {  // y = (x - t) e^-s, so that dy/ds = -y
        for (int j = 0; j < n; ++j) {
            s[j] = fast_exp(-s[j]);
            to_x[j] = grad[j] * s[j];
            to_scale[j] = (to_x[j] * (x[j] - 0.1f * shift[j]) + grad_log_det) * (slope[j] * factor);
            to_shift[j] = -0.1f * to_x[j];
        }
        if (coupled)
            for (int j = 0; j < n; ++j) coupled[j] = (x[j] - 0.1f * shift[j]) * s[j];
    } else {  // y = x e^s + t
        for (int j = 0; j < n; ++j) {
            s[j] = fast_exp(s[j]);
            to_x[j] = grad[j] * s[j];
            to_scale[j] = (to_x[j] * x[j] + grad_log_det) * (slope[j] * factor);
            to_shift[j] = 0.1f * grad[j];
        }
        if (coupled)
            for (int j = 0; j < n; ++j) coupled[j] = x[j] * s[j] + 0.1f * shift[j];
    }
    std::copy_n(to_x, n, grad_x);
    std::copy_n(to_scale, n, grad_params);
    std::copy_n(to_shift, n, grad_params + apart);
}

// Turns at most `piece` coupled values y back into x, and their gradient into that of x, in place; the
// gradient of the params goes to `grad_params`.
USF_INLINE void undo_piece(const Coupling& coupling, float* y, float* grad, const float* params,
                           std::int64_t apart, int n, float grad_log_det, float* grad_params) {
    float x[piece];
    if (!coupling.affine()) {
        for (int j = 0; j < n; ++j) x[j] = y[j] - params[j];
        std::copy_n(x, n, y);
        std::copy_n(grad, n, grad_params);
        return;
    }
    const float *shift = params + apart, factor = 0.1f * coupling.clamp;
    float s[piece], slope[piece], to_x[piece], to_scale[piece], to_shift[piece];
    log_scales(params, n, coupling.clamp, s, slope);
    for (int j = 0; j < n; ++j) {
        const float power = fast_exp(s[j]), scaled = y[j] - 0.1f * shift[j];  // x e^s
        to_scale[j] = (scaled * grad[j] + grad_log_det) * (slope[j] * factor);
        to_shift[j] = 0.1f * grad[j];
        x[j] = scaled / power;
        to_x[j] = grad[j] * power;
    }
    std::copy_n(x, n, y);
    std::copy_n(to_x, n, grad);
    std::copy_n(to_scale, n, grad_params);
    std::copy_n(to_shift, n, grad_params + apart);
}

}  // namespace usf
