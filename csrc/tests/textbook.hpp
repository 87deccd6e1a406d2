// Layers as written in a textbook, in float64, and cases of maps, channels and kernels for them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "layer.hpp"
#include "noise.hpp"

#ifdef USF_PRODUCTS

namespace usf::textbook {

using Wide = std::vector<double>;  // rows in float64

// A layer in C++ and, as written in a textbook, in float64.
struct Plain {
    int inputs, outputs, kernel_height, kernel_width;
    bool relu;
    std::vector<float> matrix, bias;

    Plain(int in, int out, bool with_relu, int kh = 1, int kw = 1)
        : inputs(in),
          outputs(out),
          kernel_height(kh),
          kernel_width(kw),
          relu(with_relu),
          matrix(noise(std::size_t(in) * out * kh * kw, 0.5f / std::sqrt(float(in * kh * kw)))),
          bias(noise(out, 0.3f)) {}

    Layer made(bool pairs, bool conditioned = false) const {
        const int taps = kernel_height * kernel_width;
        return {matrix.data(), bias.data(),   outputs,      taps * inputs, relu,
                conditioned,   kernel_height, kernel_width, pairs};
    }
    Wide of(const Wide& x, const Maps& maps, const Condition* condition = nullptr) const {
        Wide y(maps.rows() * outputs);
        for (std::int64_t row = 0; row < maps.rows(); ++row) {
            const std::int64_t at_y = row / maps.width % maps.height, at_x = row % maps.width;
            for (int o = 0; o < outputs; ++o) {
                double total = bias[o];
                if (condition) {
                    const std::int64_t from = condition->images == 1 ? row % maps.positions() : row;
                    total += condition->data[from * outputs + o];
                }
                const float* weight =
                    matrix.data() + std::ptrdiff_t(o) * kernel_height * kernel_width * inputs;
                for (int ky = 0; ky < kernel_height; ++ky) {
                    for (int kx = 0; kx < kernel_width; ++kx, weight += inputs) {
                        const std::int64_t dy = ky - kernel_height / 2, dx = kx - kernel_width / 2;
                        if (at_y + dy < 0 || at_y + dy >= maps.height) continue;
                        if (at_x + dx < 0 || at_x + dx >= maps.width) continue;
                        const double* from = x.data() + (row + dy * maps.width + dx) * inputs;
                        for (int i = 0; i < inputs; ++i) total += weight[i] * from[i];
                    }
                }
                y[row * outputs + o] = relu ? std::max(total, 0.0) : total;
            }
        }
        return y;
    }
};

inline Wide columns(const Wide& x, const std::vector<std::int64_t>& index, int channels) {
    Wide y;
    for (std::size_t row = 0; row < x.size(); row += channels)
        for (const std::int64_t i : index) y.push_back(x[row + i]);
    return y;
}

struct Case {
    Maps maps;
    std::int64_t condition_images;
    int channels, hidden;
    int kernel_height, kernel_width;  // of both layers of the affine coupling, and of the residual block
};

inline const std::vector<Case> cases = {
    {{1, 1, 1}, 1, 8, 5, 1, 1},     {{3, 5, 10}, 1, 7, 12, 1, 1}, {{2, 7, 43}, 2, 33, 40, 1, 1},
    {{5, 10, 10}, 1, 64, 64, 1, 1}, {{4, 1, 7}, 4, 2, 3, 1, 1},   {{0, 2, 2}, 1, 16, 16, 1, 1},
    {{2, 9, 11}, 1, 10, 17, 3, 3},  {{1, 1, 1}, 1, 6, 4, 3, 3},   {{3, 2, 20}, 3, 7, 16, 3, 3},
    {{2, 1, 30}, 1, 5, 6, 1, 5},    {{1, 6, 1}, 1, 4, 4, 5, 3},   {{0, 3, 3}, 1, 4, 4, 3, 3},
    {{1, 40, 40}, 1, 32, 32, 3, 3}, {{3, 7, 9}, 3, 43, 37, 3, 3}, {{2, 1, 5}, 1, 40, 20, 3, 3},
};

}  // namespace usf::textbook
#endif
