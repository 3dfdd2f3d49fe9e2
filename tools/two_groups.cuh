// Packed and Flat float32 elements (csrc/cuda/tile.cuh) of which a thread takes two groups at once, as many elements as
// of half precision: their loads, and the draws of their noise, overlap.
#pragma once

#define FASTELBO_ACCESS(...) device::TwoGroups<__VA_ARGS__>

#include "../csrc/cuda/tile.cuh"

namespace fastelbo::device {

template <class One>
struct TwoGroups : One {
  using typename One::Index;
  using typename One::Operand;
  static constexpr int groups = 2, width = 2 * One::width, blocks = 2;

  // Where there is no second group it is the first once more: stored twice, and counted once.
  struct Place {
    typename One::Place half[2];
    bool second;

    FASTELBO_INLINE bool inside(int i) const {
      return i < One::width ? half[0].inside(i) : second && half[1].inside(i - One::width);
    }
  };

  static FASTELBO_INLINE Place place(const Layout& layout, const Thread<Index>& thread, Index group) {
    const Index next = group + thread.lanes;
    const bool second = next < thread.end;
    return {{One::place(layout, thread, group), One::place(layout, thread, second ? next : group)}, second};
  }
  static FASTELBO_INLINE uint64_t block(const Layout& layout, const Place& place, int four) {
    constexpr int fours = One::width / 4;
    return One::block(layout, place.half[four / fours], four % fours);
  }
  static FASTELBO_INLINE constexpr uint32_t kept(const Operand&, const Layout&, const Place&) { return ~0u; }

  static FASTELBO_INLINE void load(const Operand& operand, const Layout& layout, const Place& place,
                                   float (&out)[width], int64_t sample = 0) {
    One::load(operand, layout, place.half[0], first(out), sample);
    One::load(operand, layout, place.half[1], last(out), sample);
  }
  static FASTELBO_INLINE void store(const Operand& operand, const Layout& layout, const Place& place,
                                    const float (&x)[width], int64_t sample = 0) {
    One::store(operand, layout, place.half[0], first(x), sample);
    One::store(operand, layout, place.half[1], last(x), sample);
  }
  static FASTELBO_INLINE void load_repeated(const Operand& operand, const Layout& layout, const Place& place,
                                            float (&out)[width]) {
    One::load_repeated(operand, layout, place.half[0], first(out));
    One::load_repeated(operand, layout, place.half[1], last(out));
  }
  static FASTELBO_INLINE void load_term(const Operand& operand, const Layout& layout, const Place& place,
                                        float (&out)[width]) {
    One::load_term(operand, layout, place.half[0], first(out));
    One::load_term(operand, layout, place.half[1], last(out));
  }
  static FASTELBO_INLINE void store_term(const Operand& operand, const Layout& layout, const Place& place,
                                         const float (&x)[width]) {
    One::store_term(operand, layout, place.half[0], first(x));
    One::store_term(operand, layout, place.half[1], last(x));
  }
  static FASTELBO_INLINE void hold(const Layout& layout, uint32_t row, const Place& place, const float (&x)[width],
                                   float* terms) {
    One::hold(layout, row, place.half[0], first(x), terms);
    One::hold(layout, row, place.half[1], last(x), terms);
  }

 private:
  using Half = float[One::width];

  static FASTELBO_INLINE Half& first(float (&x)[width]) { return reinterpret_cast<Half&>(x[0]); }
  static FASTELBO_INLINE Half& last(float (&x)[width]) { return reinterpret_cast<Half&>(x[One::width]); }
  static FASTELBO_INLINE const Half& first(const float (&x)[width]) { return reinterpret_cast<const Half&>(x[0]); }
  static FASTELBO_INLINE const Half& last(const float (&x)[width]) {
    return reinterpret_cast<const Half&>(x[One::width]);
  }
};

}  // namespace fastelbo::device
