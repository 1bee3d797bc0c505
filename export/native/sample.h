/* Chooses a token from one row of logits: the same steps, by a thread alone or by a thread block.
 *
 * Masses are integers, so that their sums do not depend on the order of threads: the same logits give the same token. */
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HSA_BOTH __host__ __device__
#else
#define HSA_BOTH
#endif

namespace hsa {

constexpr int kBins = 256;

/* Orders as the logits do, NaN above all. */
HSA_BOTH inline uint32_t order_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return UINT32_MAX;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* Of a probability, relative to the largest: 40 bits, so that 2^24 of them fit into a sum. */
HSA_BOTH inline uint64_t mass_of(float x, float peak, float temperature) {
  return uint64_t(expf((x - peak) / temperature) * 0x1p40f);
}

/* What top_p keeps: logits above the threshold, and the first `ties` of those that equal it. */
struct Kept {
  uint32_t threshold;
  uint64_t ties;
};

/* Finds the threshold by its bits, eight at a time: `bins` holds the masses by the next eight. */
template <typename Team>
HSA_BOTH Kept keep(Team& team, const float* x, int64_t V, float peak, float temperature, uint64_t need) {
  uint32_t prefix = 0;
  uint64_t above = 0, within = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = team.rank(); bin < kBins; bin += team.size()) team.bins[bin] = 0;
    team.sync();
    for (int64_t i = team.rank(); i < V; i += team.size()) {
      const uint32_t key = order_of(x[i]);
      if (shift == 24 || key >> (shift + 8) == prefix)
        team.add(&team.bins[(key >> shift) % kBins], mass_of(x[i], peak, temperature));
    }
    team.sync();
    int digit = kBins - 1;
    for (; digit && above + team.bins[digit] < need; --digit) above += team.bins[digit];
    within = team.bins[digit];
    prefix = prefix << 8 | uint32_t(digit);
    team.sync();
  }
  const uint32_t bits = prefix >> 31 ? prefix & 0x7fffffffu : ~prefix;
  float value;
  memcpy(&value, &bits, 4);
  const uint64_t each = mass_of(value, peak, temperature), missing = need - above;
  return {prefix, each && missing < within ? (missing + each - 1) / each : UINT64_MAX};
}

/* The token, by every member of the team; -1 where a logit is NaN or the largest is infinite.
 *
 * With temperature 0 the likeliest, the first of equals. Else the token at which the cumulated probability passes
 * `uniform` of what the likeliest tokens that hold `top_p` of it have together. */
template <typename Team>
HSA_BOTH int64_t choose(Team& team, const float* x, int64_t V, float temperature, float top_p, float uniform) {
  uint64_t best = 0;
  for (int64_t i = team.rank(); i < V; i += team.size()) {
    const uint64_t one = uint64_t(order_of(x[i])) << 32 | uint32_t(~i);
    if (one > best) best = one;
  }
  best = team.most(best);
  const int64_t likeliest = uint32_t(~best);
  const float peak = x[likeliest];
  if (!(fabsf(peak) <= 3.4028235e38f)) return -1;
  if (temperature == 0) return likeliest;

  uint64_t own = 0;
  for (int64_t i = team.rank(); i < V; i += team.size()) own += mass_of(x[i], peak, temperature);
  const uint64_t total = team.sum(own);
  Kept kept{0, UINT64_MAX};
  if (top_p < 1) {
    const uint64_t need = uint64_t(ceil(double(top_p) * double(total)));
    kept = keep(team, x, V, peak, temperature, need < 1 ? 1 : need < total ? need : total);
  }

  /* Members take the logits in a row of their own each. */
  const int64_t begin = V * team.rank() / team.size(), end = V * (team.rank() + 1) / team.size();
  uint64_t equal = 0;
  for (int64_t i = begin; i < end; ++i) equal += order_of(x[i]) == kept.threshold;
  const uint64_t equal_before = team.before(equal);
  const auto walk = [&](uint64_t target, uint64_t sum) { /* up to the token that passes it; the sum, where none does */
    uint64_t tie = equal_before;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t key = order_of(x[i]);
      if (key > kept.threshold || (key == kept.threshold && tie++ < kept.ties)) sum += mass_of(x[i], peak, temperature);
      if (sum > target) {
        team.found = i;
        break;
      }
    }
    return sum;
  };
  own = walk(UINT64_MAX, 0);
  const uint64_t before = team.before(own), all = team.sum(own);
  uint64_t target = uint64_t(double(uniform) * double(all));
  if (target >= all) target = all - 1;
  if (before <= target && target < before + own) walk(target, before);
  team.sync();
  const int64_t found = team.found;
  team.sync();
  return found;
}

}  // namespace hsa
