// Classify headlines with the ONNX INT8 artefact, in C++: ONNX Runtime's C API and one file of code.
//
//     make                                  # see Makefile for where ONNX Runtime is looked for
//     ./classify                            # the lab's three headlines, ../../quantised-model-optimum
//     ./classify FOLDER "Your headline" …
//
// Prints one JSON object a headline. The tokeniser is BERT's uncased WordPiece, for text in ASCII; other letters
// become [UNK]. For other models and scripts link a library that reads tokenizer.json (Node example, Python).

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_c_api.h>

using Strings = std::vector<std::string>;
using Map = std::map<std::string, std::string>;

static const OrtApi* ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

static void check(OrtStatus* status) {
    if (!status) return;
    std::string message = ort->GetErrorMessage(status);
    ort->ReleaseStatus(status);
    throw std::runtime_error(message);
}

static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path + ": run python lab04-optimum.py");
    return {std::istreambuf_iterator<char>(file), {}};
}

// A JSON string that starts at text[at], `at` moved behind it; \uXXXX below 128 only, which is all ASCII text needs.
static std::string json_string(const std::string& text, size_t& at) {
    std::string result;
    for (++at; text.at(at) != '"'; ++at) {
        if (text[at] != '\\') { result += text[at]; continue; }
        char escape = text.at(++at);
        if (escape == 'u') { result += char(std::stoi(text.substr(at + 1, 4), nullptr, 16)); at += 4; }
        else result += escape == 'n' ? '\n' : escape == 't' ? '\t' : escape;
    }
    ++at;
    return result;
}

// The flat object {"key": "text" or number, …} that follows "name": in a JSON text, values as text.
static Map json_object(const std::string& text, const std::string& name) {
    Map result;
    size_t at = text.find("\"" + name + "\":");
    if (at == std::string::npos) throw std::runtime_error("no " + name + " in the artefact");
    for (at = text.find('{', at) + 1; (at = text.find_first_of("\"}", at)) < text.size() && text[at] == '"';) {
        std::string key = json_string(text, at);
        at = text.find_first_not_of(": \n", at);
        size_t end = text.find_first_of(",}\n", at);
        if (text[at] == '"') result[key] = json_string(text, at);
        else { result[key] = text.substr(at, end - at); at = end; }
    }
    return result;
}

// Lower case, words and single punctuation marks; each word into the longest pieces of the vocabulary.
static std::vector<int64_t> tokenise(const std::string& text, const Map& vocabulary, size_t longest) {
    std::vector<int64_t> ids = {std::stoll(vocabulary.at("[CLS]"))};
    auto add_word = [&](const std::string& word) {
        std::vector<int64_t> pieces;
        for (size_t start = 0, end; start < word.size(); start = end) {
            for (end = word.size(); end > start; --end) {
                auto piece = vocabulary.find((start ? "##" : "") + word.substr(start, end - start));
                if (piece == vocabulary.end()) continue;
                pieces.push_back(std::stoll(piece->second));
                break;
            }
            if (end == start || word.size() > 100) { pieces = {std::stoll(vocabulary.at("[UNK]"))}; break; }
        }
        ids.insert(ids.end(), pieces.begin(), pieces.end());
    };
    std::string word;
    for (unsigned char c : text + " ") {
        if (c < 128 && (std::isspace(c) || std::ispunct(c))) {
            add_word(word);
            word.clear();
            if (std::ispunct(c)) add_word(std::string(1, char(c)));
        } else if (!std::iscntrl(c)) {
            word += char(c < 128 ? std::tolower(c) : c);
        }
    }
    ids.resize(std::min(ids.size(), longest - 1));
    ids.push_back(std::stoll(vocabulary.at("[SEP]")));
    return ids;
}

// Logits of one unpadded headline: every position counts, and there is one segment.
static std::vector<float> run(OrtSession* session, const Strings& inputs, const std::string& output,
                              std::vector<int64_t> ids, size_t labels) {
    std::vector<int64_t> ones(ids.size(), 1), zeros(ids.size(), 0);
    int64_t shape[] = {1, int64_t(ids.size())};
    OrtMemoryInfo* memory;
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    std::vector<OrtValue*> values(inputs.size());
    std::vector<const char*> names;
    for (size_t i = 0; i < inputs.size(); ++i) {
        auto& data = inputs[i] == "input_ids" ? ids : inputs[i] == "attention_mask" ? ones : zeros;
        check(ort->CreateTensorWithDataAsOrtValue(memory, data.data(), data.size() * sizeof(int64_t), shape, 2,
                                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &values[i]));
        names.push_back(inputs[i].c_str());
    }
    const char* wanted[] = {output.c_str()};
    OrtValue* result = nullptr;
    check(ort->Run(session, nullptr, names.data(), values.data(), values.size(), wanted, 1, &result));
    float* logits;
    check(ort->GetTensorMutableData(result, reinterpret_cast<void**>(&logits)));
    std::vector<float> copy(logits, logits + labels);
    for (OrtValue* value : values) ort->ReleaseValue(value);
    ort->ReleaseValue(result);
    ort->ReleaseMemoryInfo(memory);
    return copy;
}

int main(int count, char** arguments) try {
    std::string folder = count > 1 ? arguments[1] : "../../quantised-model-optimum";
    Strings headlines(arguments + std::min(count, 2), arguments + count);
    if (headlines.empty())
        headlines = {"Cybersecurity breach exposes NHS patient records",
                     "AI tutor program set to roll out in Scottish schools",
                     "Climate report warns UK cities face extreme flooding by 2030"};
    std::string manifest = read(folder + "/manifest.json"), key = "\"max_length\":";
    if (manifest.find("\"recheck\":") != std::string::npos)
        throw std::runtime_error(folder + " has a second graph that decides close headlines, and this example runs only "
                                 "the first: use one built without --recheck, or the Node example");
    Map labels = json_object(read(folder + "/config.json"), "id2label");
    Map vocabulary = json_object(read(folder + "/tokenizer.json"), "vocab");
    size_t longest = std::stoul(manifest.substr(manifest.find(key) + key.size()));

    setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // read when the environment is made; a user's own setting wins
    OrtEnv* environment;
    OrtSessionOptions* options;
    OrtSession* session;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "classify", &environment));
    check(ort->CreateSessionOptions(&options));
    check(ort->SetIntraOpNumThreads(options, 1));
    check(ort->AddSessionConfigEntry(options, "mlas.disable_kleidiai", "1"));  // its kernels for SME change labels
    check(ort->CreateSession(environment, (folder + "/model_quantized.onnx").c_str(), options, &session));

    OrtAllocator* allocator;
    check(ort->GetAllocatorWithDefaultOptions(&allocator));
    auto name_of = [&](auto get, size_t index) {
        char* name;
        check(get(session, index, allocator, &name));
        std::string copy = name;
        check(ort->AllocatorFree(allocator, name));
        return copy;
    };
    size_t input_count;
    check(ort->SessionGetInputCount(session, &input_count));
    Strings inputs;
    for (size_t i = 0; i < input_count; ++i) inputs.push_back(name_of(ort->SessionGetInputName, i));
    std::string output = name_of(ort->SessionGetOutputName, 0);

    for (const std::string& text : headlines) {
        auto ids = tokenise(text, vocabulary, longest);
        auto logits = run(session, inputs, output, ids, labels.size());
        size_t best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        double sum = 0;
        for (float logit : logits) sum += std::exp(double(logit) - logits[best]);
        std::printf("{\"tokens\": %zu, \"label\": \"%s\", \"id\": %zu, \"probabilities\": {", ids.size(),
                    labels.at(std::to_string(best)).c_str(), best);
        for (size_t i = 0; i < logits.size(); ++i)
            std::printf("%s\"%s\": %.9f", i ? ", " : "", labels.at(std::to_string(i)).c_str(),
                        std::exp(double(logits[i]) - logits[best]) / sum);
        std::printf("}}\n");
    }
    ort->ReleaseSession(session);
    ort->ReleaseSessionOptions(options);
    ort->ReleaseEnv(environment);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "classify: %s\n", error.what());
    return 2;
}
