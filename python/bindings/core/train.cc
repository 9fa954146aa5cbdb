#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <csignal>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/core/bindings.h"
#include "bindings/core/support.h"
#include "meshloom/train/checkpoint.h"
#include "meshloom/train/config.h"
#include "meshloom/train/gradients.h"
#include "meshloom/train/open_data.h"
#include "meshloom/train/schedule.h"
#include "meshloom/train/trainer.h"

namespace meshloom::bindings {
namespace {

namespace py = pybind11;
using train::StepMetrics;
using train::TrainConfig;
using train::Trainer;
using Unlocked = py::call_guard<py::gil_scoped_release>;

void bind_sections(py::module_& module) {
  using train::AdamWOptions;
  py::class_<AdamWOptions>(module, "AdamWOptions", "AdamW; no decay on norms, biases, embeddings.")
      .def(keyword_init<AdamWOptions>("train.AdamWOptions"))
      .def_readwrite("lr", &AdamWOptions::lr)
      .def_readwrite("beta1", &AdamWOptions::beta1)
      .def_readwrite("beta2", &AdamWOptions::beta2)
      .def_readwrite("eps", &AdamWOptions::eps)
      .def_readwrite("weight_decay", &AdamWOptions::weight_decay);
  using train::ScheduleOptions;
  py::class_<ScheduleOptions>(module, "ScheduleOptions",
                              "Linear warm-up, then cosine, linear or constant.")
      .def(keyword_init<ScheduleOptions>("train.ScheduleOptions"))
      .def_readwrite("kind", &ScheduleOptions::kind)
      .def_readwrite("warmup", &ScheduleOptions::warmup)
      .def_readwrite("steps", &ScheduleOptions::steps)
      .def_readwrite("final_fraction", &ScheduleOptions::final_fraction)
      .def(
          "factor",
          [](const ScheduleOptions& self, std::int64_t step, std::int64_t run_steps) {
            return train::schedule_factor(self, step, run_steps);
          },
          py::arg("step"), py::arg("run_steps"), "Factor on the learning rate at a step.");
  using train::ParameterRule;
  py::class_<ParameterRule>(module, "ParameterRule",
                            "Overrides for parameters whose name matches a pattern.")
      .def(keyword_init<ParameterRule>("train.ParameterRule"))
      .def_readwrite("pattern", &ParameterRule::pattern)
      .def_readwrite("lr_factor", &ParameterRule::lr_factor)
      .def_readwrite("weight_decay", &ParameterRule::weight_decay)
      .def_readwrite("frozen", &ParameterRule::frozen);
  using train::ModelSection;
  py::class_<ModelSection>(module, "ModelSection", "Where the model comes from; one of the three.")
      .def(keyword_init<ModelSection>("train.ModelSection"))
      .def_readwrite("path", &ModelSection::path)
      .def_readwrite("config", &ModelSection::config)
      .def_readwrite("preset", &ModelSection::preset);
  using train::DataSection;
  py::class_<DataSection>(module, "DataSection", "What to train on.")
      .def(keyword_init<DataSection>("train.DataSection"))
      .def_readwrite("paths", &DataSection::paths)
      .def_readwrite("weights", &DataSection::weights)
      .def_readwrite("extensions", &DataSection::extensions)
      .def_readwrite("tokenizer", &DataSection::tokenizer)
      .def_readwrite("vocab_size", &DataSection::vocab_size)
      .def_readwrite("max_document_tokens", &DataSection::max_document_tokens)
      .def_readwrite("held_out_fraction", &DataSection::held_out_fraction)
      .def_readwrite("invalid_utf8", &DataSection::invalid_utf8)
      .def_readwrite("cache", &DataSection::cache);
  using train::ExpertsSection;
  py::class_<ExpertsSection>(module, "ExpertsSection",
                             "Which rank of an expert-parallel group holds which expert, while "
                             "training.")
      .def(keyword_init<ExpertsSection>("train.ExpertsSection"))
      .def_readwrite("replan_every", &ExpertsSection::replan_every)
      .def_readwrite("least_gain", &ExpertsSection::least_gain);
  using train::ParallelSection;
  py::class_<ParallelSection>(module, "ParallelSection",
                              "How the model is spread over the layout's ranks.")
      .def(keyword_init<ParallelSection>("train.ParallelSection"))
      .def_readwrite("zero", &ParallelSection::zero)
      .def_readwrite("pipeline", &ParallelSection::pipeline)
      .def_readwrite("split", &ParallelSection::split)
      .def_readwrite("split_by", &ParallelSection::split_by)
      .def_readwrite("recompute", &ParallelSection::recompute)
      .def_readwrite("ranks_per_node", &ParallelSection::ranks_per_node)
      .def_readwrite("experts", &ParallelSection::experts);
  using train::OffloadSection;
  py::class_<OffloadSection>(module, "OffloadSection",
                             "What plans may move to host memory between forward and backward.")
      .def(keyword_init<OffloadSection>("train.OffloadSection"))
      .def_readwrite("enabled", &OffloadSection::enabled)
      .def_readwrite("resident_layers", &OffloadSection::resident_layers)
      .def_readwrite("transfer", &OffloadSection::transfer)
      .def_readwrite("folder", &OffloadSection::folder);
  using train::CheckpointSection;
  py::class_<CheckpointSection>(module, "CheckpointSection", "When to save, and how to resume.")
      .def(keyword_init<CheckpointSection>("train.CheckpointSection"))
      .def_readwrite("every_steps", &CheckpointSection::every_steps)
      .def_readwrite("every_minutes", &CheckpointSection::every_minutes)
      .def_readwrite("keep", &CheckpointSection::keep)
      .def_readwrite("resume", &CheckpointSection::resume);
}

void bind_config(py::module_& module) {
  py::class_<TrainConfig>(module, "TrainConfig",
                          "One training run; fields as docs/train.md lists them. Lists are copied\n"
                          "on reading: assign a new list to change one.")
      .def(keyword_init<TrainConfig>("train.TrainConfig"))
      .def_static("load", &TrainConfig::load, py::arg("path"),
                  "Reads a YAML file; raises DataError that names file, line and key.")
      .def_static("from_yaml", &TrainConfig::from_yaml, py::arg("text"), py::arg("name") = "config")
      .def("to_yaml", &TrainConfig::to_yaml)
      .def("validate", &TrainConfig::validate)
      .def("resolve", &TrainConfig::resolve, py::arg("world_size"), py::arg("layers") = 0)
      .def_readwrite("run", &TrainConfig::run)
      .def_readwrite("seed", &TrainConfig::seed)
      .def_readwrite("steps", &TrainConfig::steps)
      .def_readwrite("layout", &TrainConfig::layout)
      .def_readwrite("device", &TrainConfig::device)
      .def_readwrite("dtype", &TrainConfig::dtype)
      .def_readwrite("deterministic", &TrainConfig::deterministic)
      .def_readwrite("threads", &TrainConfig::threads)
      .def_readwrite("global_batch_tokens", &TrainConfig::global_batch_tokens)
      .def_readwrite("capacity_tokens", &TrainConfig::capacity_tokens)
      .def_readwrite("strategy", &TrainConfig::strategy)
      .def_readwrite("exchange", &TrainConfig::exchange)
      .def_readwrite("exchange_dtype", &TrainConfig::exchange_dtype)
      .def_readwrite("cost", &TrainConfig::cost)
      .def_readwrite("aux_loss", &TrainConfig::aux_loss)
      .def_readwrite("aux_loss_coefficient", &TrainConfig::aux_loss_coefficient)
      .def_readwrite("bias_update_speed", &TrainConfig::bias_update_speed)
      .def_readwrite("z_loss_coefficient", &TrainConfig::z_loss_coefficient)
      .def_readwrite("memory_check", &TrainConfig::memory_check)
      .def_readwrite("clip_norm", &TrainConfig::clip_norm)
      .def_readwrite("nan_policy", &TrainConfig::nan_policy)
      .def_readwrite("evaluate_every", &TrainConfig::evaluate_every)
      .def_readwrite("evaluate_tokens", &TrainConfig::evaluate_tokens)
      .def_readwrite("timeline_steps", &TrainConfig::timeline_steps)
      .def_readwrite("save_plans", &TrainConfig::save_plans)
      .def_readwrite("timeout_seconds", &TrainConfig::timeout_seconds)
      .def_readwrite("watchdog_seconds", &TrainConfig::watchdog_seconds)
      .def_readwrite("model", &TrainConfig::model)
      .def_readwrite("data", &TrainConfig::data)
      .def_readwrite("optimizer", &TrainConfig::optimizer)
      .def_readwrite("schedule", &TrainConfig::schedule)
      .def_readwrite("rules", &TrainConfig::rules)
      .def_readwrite("checkpoint", &TrainConfig::checkpoint)
      .def_readwrite("parallel", &TrainConfig::parallel)
      .def_readwrite("offload", &TrainConfig::offload);
  module.def("load_model_config", &train::load_model_config, py::arg("config"),
             "The model that the config's `model` section describes.");
  module.def(
      "open_data",
      [](const TrainConfig& config, std::int64_t vocab_size, const comm::Communicator& world,
         std::shared_ptr<data::Tokenizer> tokenizer) {
        std::shared_ptr<data::Loader> loader;
        {
          const py::gil_scoped_release release;
          loader = train::open_data(config, vocab_size, world, std::move(tokenizer));
        }
        return released_unlocked(std::move(loader));
      },
      py::arg("config"), py::arg("vocab_size"), py::arg("world"), py::arg("tokenizer") = nullptr,
      "The loader that the config's `data` section describes. Collective.");
}

void bind_metrics(py::module_& module) {
  using train::KindTraffic;
  py::class_<KindTraffic>(module, "KindTraffic",
                          "Communication of one kind in one step, summed over ranks.")
      .def_readonly("inside_bytes", &KindTraffic::inside_bytes)
      .def_readonly("between_bytes", &KindTraffic::between_bytes)
      .def_readonly("seconds", &KindTraffic::seconds)
      .def_readonly("exposed_seconds", &KindTraffic::exposed_seconds);
  using train::RankTimes;
  py::class_<RankTimes>(module, "RankTimes", "One rank's time in one step, in seconds.")
      .def_readonly("planned", &RankTimes::planned)
      .def_readonly("busy", &RankTimes::busy)
      .def_readonly("load", &RankTimes::load)
      .def_readonly("exposed", &RankTimes::exposed);
  py::class_<StepMetrics>(module, "StepMetrics", "One step as everybody sees it.")
      .def_readonly("step", &StepMetrics::step)
      .def_readonly("loss", &StepMetrics::loss)
      .def_readonly("aux_loss", &StepMetrics::aux_loss)
      .def_readonly("z_loss", &StepMetrics::z_loss)
      .def_readonly("gradient_norm", &StepMetrics::gradient_norm)
      .def_readonly("lr", &StepMetrics::lr)
      .def_readonly("tokens", &StepMetrics::tokens)
      .def_readonly("loss_tokens", &StepMetrics::loss_tokens)
      .def_readonly("samples", &StepMetrics::samples)
      .def_readonly("seconds", &StepMetrics::seconds)
      .def_readonly("tokens_per_second", &StepMetrics::tokens_per_second)
      .def_readonly("balance_efficiency", &StepMetrics::balance_efficiency)
      .def_readonly("measured_efficiency", &StepMetrics::measured_efficiency)
      .def_readonly("planning_seconds", &StepMetrics::planning_seconds)
      .def_readonly("exchange_bytes", &StepMetrics::exchange_bytes)
      .def_readonly("skipped", &StepMetrics::skipped)
      .def_readonly("extra", &StepMetrics::extra)
      .def_readonly("traffic", &StepMetrics::traffic)
      .def_readonly("group_bytes", &StepMetrics::group_bytes)
      .def_readonly("ranks", &StepMetrics::ranks)
      .def("__repr__", [](const StepMetrics& self) {
        return "<StepMetrics step=" + std::to_string(self.step) +
               " loss=" + std::to_string(self.loss) + " tokens=" + std::to_string(self.tokens) +
               ">";
      });
}

void bind_memory_report(py::module_& module) {
  using train::MemoryReport;
  py::class_<MemoryReport>(module, "MemoryReport",
                           "What a run is expected to take of its machines, in bytes.")
      .def_property_readonly("setting", [](const MemoryReport& self) { return self.setting; })
      .def_property_readonly("limits", [](const MemoryReport& self) { return self.limits; })
      .def_readonly("stages", &MemoryReport::stages, "Forecasts of a rank of each stage.")
      .def_readonly("baseline", &MemoryReport::baseline,
                    "What processes held before anything was built, by world rank.")
      .def_property_readonly("needed", [](const MemoryReport& self) { return self.room.needed; })
      .def_property_readonly("has", [](const MemoryReport& self) { return self.room.has; })
      .def_property_readonly("fits", &MemoryReport::fits)
      .def_property_readonly("fullest", &MemoryReport::fullest)
      .def_readonly("changes", &MemoryReport::changes)
      .def("__str__", &MemoryReport::text);
}

void bind_trainer(py::module_& module) {
  py::class_<Trainer, std::unique_ptr<Trainer, UnlockedDelete>>(
      module, "Trainer",
      "Trains one model on one communicator. Every rank makes the same calls (collective).\n"
      "Iterating trains with the run folder's records, evaluation and checkpoints.")
      .def(py::init([](const TrainConfig& config, const model::ModelConfig& model,
                       std::shared_ptr<data::Loader> loader, const comm::Communicator& world,
                       std::shared_ptr<plan::BalanceStrategy> strategy,
                       std::function<void(const std::string&)> on_hang) {
             const py::gil_scoped_release release;
             train::TrainerHooks hooks;
             hooks.on_hang = std::move(on_hang);
             return std::unique_ptr<Trainer, UnlockedDelete>(new Trainer(
                 config, model, std::move(loader), world, std::move(strategy), std::move(hooks)));
           }),
           py::arg("config"), py::arg("model"), py::arg("loader"), py::arg("world"),
           py::arg("strategy") = nullptr, py::arg("on_hang") = nullptr)
      .def_property_readonly("config", &Trainer::config, "As resolved.")
      .def_property_readonly("model_config", &Trainer::model_config)
      .def_property_readonly("next_step", &Trainer::next_step)
      .def_property_readonly("finished", &Trainer::finished)
      .def_property_readonly("resumed_from", &Trainer::resumed_from)
      .def_property_readonly("notices", &Trainer::notices,
                             "What a user should know and no error says, in order of time.")
      .def_property_readonly("memory", &Trainer::memory,
                             "What the run was expected to take, before anything was built.")
      .def_property_readonly("last_plan", &Trainer::last_plan)
      .def("step", &Trainer::step, Unlocked(), "One optimizer step, without records.")
      .def("advance", &Trainer::advance, Unlocked(),
           "One step with records, evaluation and checkpoints; None once the run has ended.")
      .def("evaluate", &Trainer::evaluate, Unlocked(), "Mean token loss over held-out documents.")
      .def("save_checkpoint", &Trainer::save_checkpoint, Unlocked())
      .def("save_pretrained", &Trainer::save_pretrained, py::arg("folder"), Unlocked(),
           "A folder that Hugging Face transformers opens.")
      .def("run", &Trainer::run, py::arg("on_step") = nullptr, Unlocked(),
           "`advance` until the run has ended.")
      .def("__iter__", [](const py::object& self) { return self; })
      .def("__next__",
           [](Trainer& self) {
             std::optional<StepMetrics> metrics;
             {
               const py::gil_scoped_release release;
               metrics = self.advance();
             }
             if (!metrics) throw py::stop_iteration();
             return *metrics;
           })
      .def_static("request_stop", &Trainer::request_stop,
                  "Every run of this process finishes its step, saves and returns.")
      .def_static("request_report", &Trainer::request_report,
                  "Every trainer of this process soon says in its run folder what it waits for.");
  module.def(
      "report_on_signal",
      [](int number) {
        struct sigaction action {};
        action.sa_handler = [](int) { Trainer::request_report(); };
        action.sa_flags = SA_RESTART;
        if (sigaction(number, &action, nullptr) != 0) {
          throw InvalidArgument("train.report_on_signal",
                                "signal " + std::to_string(number) + " cannot be handled");
        }
      },
      py::arg("signal"), "From now on this signal means Trainer.request_report().");
  module.def(
      "stop_on_signals",
      [](const std::vector<int>& signals) {
        for (const int number : signals) {
          struct sigaction action {};
          action.sa_handler = [](int) { Trainer::request_stop(); };
          action.sa_flags = SA_RESTART;
          if (number == SIGINT) action.sa_flags |= static_cast<int>(SA_RESETHAND);
          if (sigaction(number, &action, nullptr) != 0) {
            throw InvalidArgument("train.stop_on_signals",
                                  "signal " + std::to_string(number) + " cannot be handled");
          }
        }
      },
      py::arg("signals"),
      "From now on these signals mean Trainer.request_stop(); a second SIGINT ends the process.");
}

void bind_gradients(py::module_& module) {
  using train::GradientsOptions;
  using train::GradientsResult;
  py::class_<GradientsOptions>(module, "GradientsOptions", "What `gradients` computes, and how.")
      .def(keyword_init<GradientsOptions>("train.GradientsOptions"))
      .def_readwrite("model", &GradientsOptions::model)
      .def_readwrite("dtype", &GradientsOptions::dtype)
      .def_readwrite("device", &GradientsOptions::device)
      .def_readwrite("layout", &GradientsOptions::layout)
      .def_readwrite("parallel", &GradientsOptions::parallel)
      .def_readwrite("strategy", &GradientsOptions::strategy)
      .def_readwrite("capacity_tokens", &GradientsOptions::capacity_tokens)
      .def_readwrite("plan", &GradientsOptions::plan)
      .def_readwrite("aux_loss", &GradientsOptions::aux_loss);
  py::class_<GradientsResult>(module, "GradientsResult", "Loss and all gradients of one step.")
      .def_readonly("loss", &GradientsResult::loss)
      .def_readonly("aux_loss", &GradientsResult::aux_loss)
      .def_readonly("names", &GradientsResult::names)
      .def_readonly("gradients", &GradientsResult::gradients)
      .def_readonly("plan", &GradientsResult::plan)
      .def("save", &train::save_gradients, py::arg("path"), Unlocked(),
           "A safetensors file under the model folder's names, and a scalar `loss`.");
  module.def("gradients", &train::gradients, py::arg("options"), py::arg("documents"),
             py::arg("world"), py::arg("strategy") = nullptr, Unlocked(),
             "One step's loss and all gradients under a layout. Collective.\n"
             "`strategy` makes the plan instead of the one that the options name.");
}

}  // namespace

void bind_train(py::module_& module) {
  module.def(
      "export_checkpoint", &train::export_checkpoint, py::arg("checkpoint"), py::arg("folder"),
      py::arg("dtype") = "float32", Unlocked(),
      "Writes the model of a checkpoint, of any layout, as a folder that transformers opens.");
  bind_sections(module);
  bind_config(module);
  bind_metrics(module);
  bind_memory_report(module);
  bind_trainer(module);
  bind_gradients(module);
}

}  // namespace meshloom::bindings
