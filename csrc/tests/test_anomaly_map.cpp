#include <cmath>
#include <vector>

#include "anomaly_map.hpp"
#include "check.hpp"
#include "noise.hpp"

using namespace usf;

namespace anomaly_map_test {

struct Latents {
    std::int64_t channels, height, width;
    std::vector<float> values;  // [batch, height, width, channels]
};

// Of one output along an axis.
struct Sources {
    std::int64_t first, second;
    double near, far;

    Sources(std::int64_t from, std::int64_t to, std::int64_t i) {
        const double place = std::clamp((i + 0.5) * from / to - 0.5, 0.0, from - 1.0);
        first = static_cast<std::int64_t>(place);
        second = std::min(first + 1, from - 1);
        far = place - static_cast<double>(first);
        near = 1 - far;
    }
};

// In float64 from the definition: latents, or likelihoods, are resized.
double expected(const std::vector<Latents>& scales, bool latent, std::int64_t image, std::int64_t height,
                std::int64_t width, std::int64_t y, std::int64_t x) {
    double total = 0;
    for (const auto& [channels, h, w, values] : scales) {
        const Sources rows(h, height, y), columns(w, width, x);
        const auto at = [&](std::int64_t i, std::int64_t j, std::int64_t c) {
            return static_cast<double>(values[((image * h + i) * w + j) * channels + c]);
        };
        const auto resized = [&](auto value) {
            return rows.near * (columns.near * value(rows.first, columns.first) +
                                columns.far * value(rows.first, columns.second)) +
                   rows.far * (columns.near * value(rows.second, columns.first) +
                               columns.far * value(rows.second, columns.second));
        };
        if (latent) {
            double norm = 0;
            for (std::int64_t c = 0; c < channels; ++c)
                norm += std::pow(resized([&](auto i, auto j) { return at(i, j, c); }), 2);
            total -= std::expm1(-norm / (2.0 * channels));
        } else {
            total += resized([&](auto i, auto j) {
                double norm = 0;
                for (std::int64_t c = 0; c < channels; ++c) norm += std::pow(at(i, j, c), 2);
                return -std::expm1(-norm / (2.0 * channels));
            });
        }
    }
    return total / static_cast<double>(scales.size());
}

void test(std::int64_t batch, std::vector<Latents> scales, std::int64_t height, std::int64_t width) {
    std::vector<std::vector<float>> products;
    for (Latents& z : scales) {
        z.values = noise(batch * z.height * z.width * z.channels);
        std::vector<float>& maps = products.emplace_back(4 * batch * z.height * z.width, NAN);
        pixel_products(z.values.data(), batch, z.height, z.width, z.channels, maps.data(), 3);
    }
    for (const bool latent : {false, true}) {
        const auto run = [&](float* out, int threads) {
            std::vector<std::vector<float>> given = products;  // may be written to
            std::vector<Scale> maps;
            for (std::size_t i = 0; i < scales.size(); ++i)
                maps.push_back({given[i].data(), scales[i].channels, scales[i].height, scales[i].width});
            anomaly_map(maps, latent, batch, height, width, out, threads);
        };
        std::vector<float> out(batch * height * width, NAN), again = out;
        run(out.data(), 1);
        run(again.data(), 3);
        CHECK(out == again);
        double worst = 0;
        for (std::int64_t i = 0; i < std::ssize(out); ++i) {
            const double value =
                expected(scales, latent, i / (height * width), height, width, i / width % height, i % width);
            worst = std::max(worst, std::abs(out[i] - value));
        }
        CHECK(worst < 1e-6);
    }
}

}  // namespace anomaly_map_test

int test_anomaly_map(int, char*[]) {
    using namespace anomaly_map_test;
    test(1, {{1, 1, 1, {}}}, 1, 1);
    test(2, {{3, 1, 4, {}}, {70, 5, 1, {}}}, 3, 9);
    test(3, {{33, 14, 20, {}}, {5, 7, 10, {}}, {64, 3, 3, {}}}, 37, 50);
    test(1, {{8, 28, 28, {}}}, 28, 28);
    test(1, {{4, 30, 20, {}}}, 7, 5);    // smaller than the latents
    test(2, {{2, 3, 5, {}}}, 4, 20000);  // a task per row
    test(2, {{16, 64, 64, {}}}, 256, 256);
    return failures != 0;
}
