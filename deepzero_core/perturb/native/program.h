// A program: what one parameter's perturbations do on their way through a stretch of the network, as steps that each
// take one slice. Between two places where the batch is coupled (the statistics of a normalisation) the steps of a slice
// follow each other while it is in the caches; these stretches are the program's phases.
//
//   for a few perturbations at once:  for every phase:  for every slice: its steps;  then the statistics they gathered
#pragma once
#include <cmath>
#include <vector>

#include "activation.h"
#include "chain.h"
#include "convolution.h"
#include "winograd.h"

enum Kind : Index {
  WEIGHT, AFFINE, CONVOLVE, WINOGRAD, WINOGRAD_BFLOAT16, MOMENTS, CHAIN, MEAN, PLACE, ACTIVATE, AVERAGE
};
enum Storage : Index { LOCAL, SHARED, EXTERNAL };

struct Buffer {  // of one slice of one perturbation
  Index storage;   // of the thread, of the perturbation, or of the caller: what enters and leaves the program
  Index offset;    // floats; the number of what is the caller's
  Index channels;  // 1 where `thin`
  Index length;    // of a channel
  Index thin;      // only one channel moves: the perturbed one plus `shift`
  Index shift;

  Index floats() const { return channels * length; }
};

struct Norm {  // a normalisation with batch statistics
  const float *values, *mean, *scale, *gamma, *beta;  // base values [S, C, length]; (v + eps)^-1/2; null: 1, 0
  Index source, phase, channels, all_channels, sums;  // `sums`: where its sums and coefficients lie, in channels
};

struct Step {
  Index kind, source, residual, target, norm;  // buffers and normalisation, -1: none
  Shape shape;
  const float *weight, *values, *mean, *scale;  // `values` of a WEIGHT: the convolution's input, [S, C, length]
  const float* base;  // of the rectifier or the pooling [S, C, length]; null: the normalisation's result
  Index values_channels, base_channels, rectify, pool;
  Index front;  // of a PLACE of all channels: how many that do not move come first
  Index groups, group_channels;  // of a convolution; `shape` is that of one group
  Index function;                // of an ACTIVATE
  double slope;
  Parameters parameters;
};

struct Program {
  const Step* steps;
  const Buffer* buffers;
  const Norm* norms;
  const Index* phase_ends;
  Index phases, norm_count, slices, batch;
  Index local_floats, shared_floats, scratch_floats, channels;  // `channels`: of all normalisations together
};

struct Run {  // one call: `group` perturbations at a time
  const Program& program;
  const Moved* moved;
  const float* steps;  // by how much it moves
  Index group;
  float* local;   // [threads, local_floats + scratch_floats]
  float* shared;  // [group, slices, shared_floats]
  float** external;
  std::vector<double> sums;    // [group, slices, channels, 2]
  std::vector<float> coefficients;  // [group, channels, 3]
};

struct Slice {  // where the steps of one slice find what they need, and leave its sums
  Run& run;
  Index in_group, perturbation, number;
  float* local;
  float* scratch;

  const Moved& moved() const { return run.moved[perturbation]; }
  float step() const { return run.steps[perturbation]; }
  float* at(const Buffer& b) const {
    const Index row = in_group * run.program.slices + number;
    if (b.storage == LOCAL) return local + b.offset;
    if (b.storage == SHARED) return run.shared + row * run.program.shared_floats + b.offset;
    return run.external[b.offset] + (perturbation * run.program.slices + number) * b.floats();
  }
  Index first_channel(const Buffer& b) const { return b.thin ? moved().channel + b.shift : 0; }
  Index examples() const { return std::min<Index>(LANES, run.program.batch - number * LANES); }
};

static void normalised_base(Link& k, const Norm& norm, Index slice, Index channel, Index length) {
  k.values = norm.values + (slice * norm.all_channels + channel) * length;
  k.mean = norm.mean[channel];
  k.gain = norm.scale[channel] * (norm.gamma ? norm.gamma[channel] : 1);
  k.bias = norm.beta ? norm.beta[channel] : 0;
}

static void chain(const Slice& s, const Step& step) {
  const Program& p = s.run.program;
  const Buffer &source = p.buffers[step.source], &target = p.buffers[step.target];
  const Buffer* residual = step.residual < 0 ? nullptr : &p.buffers[step.residual];
  const Norm* norm = step.norm < 0 ? nullptr : &p.norms[step.norm];
  const Index first = s.first_channel(target);
  for (Index c = 0; c < target.channels; c++) {
    const Index channel = first + c;  // of the base values
    Link k = {};
    k.delta = s.at(source) + c * source.length;
    k.a = step.scale ? step.scale[channel] : 1;
    if (norm) {
      const float* with = &s.run.coefficients[3 * (s.in_group * p.channels + norm->sums + c)];
      k.a = with[0], k.c = with[1], k.d = with[2];
      normalised_base(k, *norm, s.number, channel, source.length);
    }
    if (residual) {
      const Index place = residual->thin ? channel - s.first_channel(*residual) : c;
      if (place >= 0 && place < residual->channels) k.residual = s.at(*residual) + place * residual->length;
    }
    if (step.base) k.base = step.base + (s.number * step.base_channels + channel) * source.length;
    k.slope = float(step.slope);
    k.out = s.at(target) + c * target.length;
    evaluate(k, source.length, step.pool ? &step.shape : nullptr, step.rectify);
  }
}

static void activate(const Slice& s, const Step& step) {
  const Program& p = s.run.program;
  const Buffer& source = p.buffers[step.source];
  for (Index c = 0; c < source.channels; c++) {
    const Index channel = s.first_channel(source) + c;
    Link k = {};
    k.delta = s.at(source) + c * source.length;
    k.out = s.at(p.buffers[step.target]) + c * source.length;
    if (step.base)
      k.base = step.base + (s.number * step.base_channels + channel) * source.length;
    else
      normalised_base(k, p.norms[step.norm], s.number, channel, source.length);
    activate(step.function, k, step.parameters, source.length);
  }
}

// A channel that moves alone feeds its own group of outputs; the others stay.
static void convolve(const Slice& s, const Step& step) {
  const Buffer &source = s.run.program.buffers[step.source], &target = s.run.program.buffers[step.target];
  const Shape& shape = step.shape;
  const Index first = s.first_channel(source);
  const float* weight = step.weight + first * shape.kernel_height * shape.kernel_width * shape.outputs;
  float* out = s.at(target);
  if (source.thin && !target.thin && step.groups > 1) {
    std::fill(out, out + target.floats(), 0.0f);
    out += first / step.group_channels * shape.outputs * target.length;
  }
  convolve(shape, source.thin ? 1 : step.groups, s.at(source), weight, out, reinterpret_cast<Index*>(s.scratch));
}

static void perform(const Slice& s, const Step& step) {
  const Program& p = s.run.program;
  const Buffer* source = step.source < 0 ? nullptr : &p.buffers[step.source];
  const Buffer* target = step.target < 0 ? nullptr : &p.buffers[step.target];
  switch (step.kind) {
    case WEIGHT:
      return weight_moved(step.shape, step.values + s.number * step.values_channels * step.shape.length(), s.moved(),
                          s.step(), s.at(*target));
    case AFFINE: {
      const Index channel = s.moved().channel;
      const float* values =
          step.values ? step.values + (s.number * step.values_channels + channel) * target->length : nullptr;
      return affine_moved(values, step.mean ? step.mean[channel] : 0, step.scale ? step.scale[channel] : 1, s.step(),
                          target->length, s.at(*target));
    }
    case CONVOLVE: return convolve(s, step);
    case WINOGRAD: return winograd<Float32>(step.shape, s.at(*source), step.weight, s.at(*target), s.scratch);
#if defined(__AVX512BF16__)
    case WINOGRAD_BFLOAT16:
      return winograd<BFloat16>(step.shape, s.at(*source), step.weight, s.at(*target), s.scratch);
#endif
    case MOMENTS: {
      const Norm& norm = p.norms[step.norm];
      const Index first = s.first_channel(*source);
      for (Index c = 0; c < source->channels; c++)
        moments(s.at(*source) + c * source->length,
                norm.values + (s.number * norm.all_channels + first + c) * source->length, norm.mean[first + c],
                source->length, s.examples(),
                &s.run.sums[2 * ((s.in_group * p.slices + s.number) * p.channels + norm.sums + c)]);
      return;
    }
    case CHAIN: return chain(s, step);
    case ACTIVATE: return activate(s, step);
    case AVERAGE:
      for (Index c = 0; c < source->channels; c++)
        averaged(step.shape, s.at(*source) + c * source->length, s.at(*target) + c * target->length);
      return;
    case MEAN:
      for (Index c = 0; c < source->channels; c++)
        mean_over_space(s.at(*source) + c * source->length, source->length, s.at(*target) + c * LANES);
      return;
    case PLACE: {
      for (Index c = 0; c < target->channels; c++) {
        const Index from = c - step.front;
        float* to = s.at(*target) + c * target->length;
        if (from >= 0 && from < source->channels)
          placed(step.shape, s.at(*source) + from * source->length, to);
        else
          std::fill(to, to + target->length, 0.0f);
      }
      return;
    }
  }
}

// Delta m and delta s of a perturbation from its sums over all slices, as what a chain multiplies with; see norm.py.
static void normalise(Run& run, const Norm& norm, Index in_group, Index perturbation) {
  const Program& p = run.program;
  const Buffer& source = p.buffers[norm.source];
  const Index first = source.thin ? run.moved[perturbation].channel + source.shift : 0;
  const double count = double(source.length / LANES) * double(p.batch);
  for (Index c = 0; c < norm.channels; c++) {
    double total[2] = {};
    for (Index s = 0; s < p.slices; s++)
      for (int k = 0; k < 2; k++) total[k] += run.sums[2 * ((in_group * p.slices + s) * p.channels + norm.sums + c) + k];
    const double mean = total[0] / count, variance = total[1] / count - mean * mean;
    const double scale = norm.scale[first + c], gamma = norm.gamma ? norm.gamma[first + c] : 1;
    const double moved = 1 / std::sqrt(1 / (scale * scale) + variance);
    const double rescale = -variance * (scale * moved) * (scale * moved) / (scale + moved);
    float* out = &run.coefficients[3 * (in_group * p.channels + norm.sums + c)];
    out[0] = float(gamma * (scale + rescale));
    out[1] = float(-gamma * (scale + rescale) * mean);
    out[2] = float(gamma * rescale);
  }
}

static void execute(Run& run, Index count, int threads) {
  const Program& p = run.program;
  run.sums.resize(2 * run.group * p.slices * p.channels);
  run.coefficients.resize(3 * run.group * p.channels);
#pragma omp parallel num_threads(threads)
  {
    float* local = run.local + omp_get_thread_num() * (p.local_floats + p.scratch_floats);
    for (Index from = 0; from < count; from += run.group) {
      const Index group = std::min(run.group, count - from);
      for (Index phase = 0, first = 0; phase < p.phases; first = p.phase_ends[phase++]) {
#pragma omp for collapse(2) schedule(static)
        for (Index number = 0; number < p.slices; number++)
          for (Index g = 0; g < group; g++) {
            const Slice slice{run, g, from + g, number, local, local + p.local_floats};
            for (Index k = first; k < p.phase_ends[phase]; k++) perform(slice, p.steps[k]);
          }
#pragma omp for schedule(static)
        for (Index g = 0; g < group; g++)
          for (Index n = 0; n < p.norm_count; n++)
            if (p.norms[n].phase == phase) normalise(run, p.norms[n], g, from + g);
      }
    }
  }
}
