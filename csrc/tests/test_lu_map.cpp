#include <cmath>
#include <vector>

#include "check.hpp"
#include "lu_map.hpp"
#include "noise.hpp"

#ifdef USF_PRODUCTS

using namespace usf;

namespace lu_map_test {

using Values = std::vector<double>;

// What `lu_map` finds, in float64: the sum of all results, weighted, of which the gradients are differences.
struct Reference {
    int channels;
    Values matrix, moved;
    double log_det = 0;

    Reference(int n, const Values& lower, const Values& upper, const Values& signs, const Values& logs,
              const Values& bias, const Values& log_scale, const Values& offset)
        : channels(n), matrix(std::size_t{1} * n * n), moved(bias) {
        for (int o = 0; o < n; ++o) {
            for (int c = 0; c < n; ++c) {
                double sum = 0;
                for (int k = 0; k <= std::min(o, c); ++k)
                    sum += (k == o ? 1 : lower[o * n + k]) *
                           (k == c ? signs[c] * std::exp(logs[c]) : upper[k * n + c]);
                moved[o] += sum * offset[c];
                matrix[o * n + c] = sum * std::exp(log_scale[c]);
            }
            log_det += logs[o] + log_scale[o];
        }
    }
    double weighted(const std::vector<float>& of_matrix, const std::vector<float>& of_moved,
                    float of_log_det) const {
        double total = of_log_det * log_det;
        for (std::size_t i = 0; i < matrix.size(); ++i) total += of_matrix[i] * matrix[i];
        for (int c = 0; c < channels; ++c) total += of_moved[c] * moved[c];
        return total;
    }
};

// With an ActNorm or not, with a free diagonal or not; matrices with gaps and noise beside their triangles.
void test(int n, bool act_norm, bool diagonal, int threads) {
    const std::int64_t size = std::int64_t{n} * n, stride = n + 2;
    const float small = 1 / std::sqrt(float(n));
    const auto lower = noise(n * stride, small), upper = noise(n * stride, small), bias = noise(n);
    auto signs = noise(n);
    for (float& sign : signs) sign = std::copysign(1.0f, sign);
    const auto logs = noise(n, 0.3f), log_scale = noise(n, 0.3f), offset = noise(n);
    const LuParameters given{n,
                             lower.data(),
                             stride,
                             upper.data(),
                             stride,
                             signs.data(),
                             diagonal ? logs.data() : nullptr,
                             act_norm ? log_scale.data() : nullptr,
                             act_norm ? offset.data() : nullptr};
    std::vector<float> memory(3 * size, NAN), matrix(size, NAN), moved(n, NAN);
    const float log_det = lu_map(given, act_norm ? bias.data() : nullptr, matrix.data(),
                                 act_norm ? moved.data() : nullptr, memory.data(), threads);

    std::vector<Values> parts(7);
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
            parts[0].push_back(lower[i * stride + j]);
            parts[1].push_back(upper[i * stride + j]);
        }
    const Values zeros(n, 0.0);
    const auto wide = [&](const std::vector<float>& v, bool there) {
        return there ? Values(v.begin(), v.end()) : zeros;
    };
    parts[2] = wide(signs, true), parts[3] = wide(logs, diagonal), parts[4] = wide(bias, act_norm);
    parts[5] = wide(log_scale, act_norm), parts[6] = wide(offset, act_norm);
    const auto reference = [&] {
        return Reference(n, parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6]);
    };
    const Reference truth = reference();
    for (std::int64_t i = 0; i < size; ++i) CHECK(std::abs(matrix[i] - truth.matrix[i]) <= 1e-5);
    for (int c = 0; c < n && act_norm; ++c) CHECK(std::abs(moved[c] - truth.moved[c]) <= 3e-5);
    CHECK(std::abs(log_det - truth.log_det) <= 1e-5 * n);

    const auto of_matrix = noise(size, small);
    const auto of_moved = act_norm ? noise(n) : std::vector<float>(n, 0.0f);
    const float of_log_det = 0.7f;
    std::vector<float> of_lower(size, NAN), of_upper(size, NAN), of_logs(n, NAN), of_scale(n, NAN),
        of_offset(n, NAN);
    lu_map_gradients(given, matrix.data(),
                     {of_matrix.data(), of_moved.data(), of_log_det, of_lower.data(), of_upper.data(),
                      diagonal ? of_logs.data() : nullptr, act_norm ? of_scale.data() : nullptr,
                      act_norm ? of_offset.data() : nullptr},
                     memory.data(), threads);
    const auto difference = [&](double& value) {
        const double before = value, step = 1e-5;
        value = before + step;
        const double more = reference().weighted(of_matrix, of_moved, of_log_det);
        value = before - step;
        const double less = reference().weighted(of_matrix, of_moved, of_log_det);
        value = before;
        return (more - less) / (2 * step);
    };
    const auto close = [](double found, double expected) {
        return std::abs(found - expected) <= 1e-4 * (1 + std::abs(expected));
    };
    const int some = std::max(1, n / 3);  // differences of all would take long
    for (int i = 0; i < n; i += some) {
        for (int j = 0; j < n; j += some) {
            CHECK(close(of_lower[i * n + j], j < i ? difference(parts[0][i * n + j]) : 0));
            CHECK(close(of_upper[i * n + j], j > i ? difference(parts[1][i * n + j]) : 0));
        }
        if (diagonal) CHECK(close(of_logs[i], difference(parts[3][i])));
        if (act_norm) {
            CHECK(close(of_scale[i], difference(parts[5][i])));
            CHECK(close(of_offset[i], difference(parts[6][i])));
        }
    }
}

}  // namespace lu_map_test

int test_lu_map(int, char*[]) {
    using namespace lu_map_test;
    for (most_lanes = 4; most_lanes <= 16; most_lanes *= 2)
        for (const bool act_norm : {false, true})
            for (const bool diagonal : {false, true}) {
                test(1, act_norm, diagonal, 1);
                test(7, act_norm, diagonal, 2);
                test(50, act_norm, diagonal, 2);
                test(70, act_norm, diagonal, 3);
            }
    test(200, true, true, 2);
    return failures != 0;
}

#else
int test_lu_map(int, char*[]) {
    return 0;
}
#endif
