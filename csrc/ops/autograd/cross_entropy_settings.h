// The settings that both cross entropies save for backward.
#pragma once

#include "ops/autograd/function.h"

namespace dlk {

struct CrossEntropySettings {
  int64_t reduction, ignore_index;
  double label_smoothing;

  void save(AutogradContext* ctx) const {
    ctx->save("reduction", reduction);
    ctx->save("ignore_index", ignore_index);
    ctx->save("label_smoothing", label_smoothing);
  }
  static CrossEntropySettings saved_in(AutogradContext* ctx) {
    return {ctx->saved<int64_t>("reduction"), ctx->saved<int64_t>("ignore_index"),
            ctx->saved<double>("label_smoothing")};
  }
};

}  // namespace dlk
