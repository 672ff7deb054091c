// Classify headlines with the ONNX INT8 artefact, in C++: ONNX Runtime, ICU, nlohmann-json and this file.
//     make && ./classify ../../quantised-model-optimum "Your headline" …    # the Makefile says what it takes
// Prints one JSON object a headline, as the Node example does, and rechecks if the folder was built with --recheck.
// Tokens are those of tokenizer.json if it is BERT's WordPiece; any other is refused.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <sstream>
#include <unordered_map>

#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>
#include <unicode/translit.h>

using json = nlohmann::json;
using Ids = std::vector<int64_t>;

static void refuse_if(bool refused, const std::string& why) { if (refused) throw std::runtime_error(why); }

struct WordPiece {  // with the settings of a tokenizer.json and of a manifest
    std::unordered_map<std::string, int64_t> vocabulary, added;
    std::unique_ptr<icu::Transliterator> into_words;
    std::string prefix, unknown;
    Ids around;  // ids that surround a text, which has its place among them
    size_t place = 0, room;
    int32_t longest_word;
    bool cut_left;

    WordPiece(const json& file, const json& settings) {
        auto type_of = [&](auto part) { return file.at(part).is_null() ? "none" : file[part].value("type", "none"); };
        for (auto [part, type] : {std::pair("normalizer", "BertNormalizer"), {"pre_tokenizer", "BertPreTokenizer"},
                                  {"model", "WordPiece"}, {"post_processor", "TemplateProcessing or BertProcessing"}})
            refuse_if(std::string(type).find(type_of(part)) == std::string::npos, std::string("tokenizer.json's ") +
                      part + " is " + type_of(part) + ", not " + type + ": use the Node example");
        for (const json& token : file.at("added_tokens")) {
            for (auto flag : {"single_word", "lstrip", "rstrip", "normalized"})
                refuse_if(token.at(flag), std::string("tokenizer.json has a ") + flag + " token: use the Node example");
            added[token.at("content")] = token.at("id");
        }
        const json &model = file["model"], &normalizer = file["normalizer"], &after = file["post_processor"];
        model.at("vocab").get_to(vocabulary);
        model.at("continuing_subword_prefix").get_to(prefix);
        model.at("unk_token").get_to(unknown);
        model.at("max_input_chars_per_word").get_to(longest_word);
        if (after["type"] == "BertProcessing") around = {after.at("cls")[1], after.at("sep")[1]}, place = 1;
        else for (const json& item : after.at("single"))
            if (item.contains("Sequence")) place = around.size();
            else for (auto& id : after["special_tokens"].at(item["SpecialToken"]["id"])["ids"]) around.push_back(id);
        room = settings.at("max_length").get<size_t>() - around.size();
        cut_left = settings.value("truncation_side", "right") == "left";

        // The tokenizers library knows the characters and categories of Unicode 8, and these places as Chinese.
        bool lower = normalizer.at("lowercase"), strip = lower;
        if (!normalizer.at("strip_accents").is_null()) normalizer["strip_accents"].get_to(strip);
        std::string rules, alone = "[[:P:] & [:Age=8.0:]] [\\$+<=>\\^`|~ \\u166D\\U000111C9]";
        if (normalizer.at("clean_text")) rules += "[[[[:Cc:][:Cf:][:Co:]] & [:Age=8.0:] - [\\t\\n\\r]] \\uFFFD] > ;";
        if (strip) rules += ":: NFD; [[[:Mn:] & [:Age=8.0:] - [\\u1885\\u1886\\uA9BD\\U000111C9]] \\u1734] > ;";
        if (lower) rules += "Σ > σ; :: Lower;";  // a sigma that ends a word is as any other
        if (normalizer.at("handle_chinese_chars"))
            alone += "\\u3400-\\u4DBF \\u4E00-\\u9FFF \\uF900-\\uFAFF \\U00020000-\\U0002A6DF \\U0002A700-\\U0002B73F"
                     "\\U0002B740-\\U0002B81F \\U0002B920-\\U0002CEAF \\U0002F800-\\U0002FA1F";
        rules += "[:White_Space:] > ' '; ([" + alone + "]) > ' ' $1 ' ';";
        UErrorCode error = U_ZERO_ERROR;
        UParseError at;
        into_words.reset(icu::Transliterator::createFromRules("words", rules.c_str(), UTRANS_FORWARD, at, error));
        refuse_if(U_FAILURE(error), std::string("ICU does not read the rules: ") + u_errorName(error));
    }

    Ids encode(const std::string& text) const {
        Ids ids, all = around;
        std::string between;  // tokens that the text itself spells out, as [SEP]
        for (size_t at = 0; at < text.size();) {
            std::string token;
            for (auto& [content, id] : added)
                if (content.size() > token.size() && text.compare(at, content.size(), content) == 0) token = content;
            if (token.empty()) { between += text[at++]; continue; }
            add_words(std::exchange(between, ""), ids);
            ids.push_back(added.at(token));
            at += token.size();
        }
        add_words(between, ids);
        size_t extra = ids.size() - std::min(ids.size(), room), cut = cut_left ? extra : 0;
        all.insert(all.begin() + place, ids.begin() + cut, ids.end() - (extra - cut));
        return all;
    }

    void add_words(const std::string& text, Ids& ids) const {
        icu::UnicodeString normal = icu::UnicodeString::fromUTF8(text);
        into_words->transliterate(normal);
        std::string utf8, word;
        for (std::istringstream words(normal.toUTF8String(utf8)); words >> word;) {
            bool short_enough = icu::UnicodeString::fromUTF8(word).countChar32() <= longest_word;
            Ids pieces;
            size_t start = 0;
            for (size_t end = word.size(); short_enough && end > start; --end) {  // the longest that the vocabulary has
                auto piece = vocabulary.find((start ? prefix : "") + word.substr(start, end - start));
                if (piece == vocabulary.end()) continue;
                pieces.push_back(piece->second);
                start = end, end = word.size() + 1;
            }
            if (start < word.size()) pieces = {vocabulary.at(unknown)};
            ids.insert(ids.end(), pieces.begin(), pieces.end());
        }
    }
};

static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    refuse_if(!file, "cannot read " + path + ": run python lab04-optimum.py");
    return {std::istreambuf_iterator<char>(file), {}};
}

// Logits of one headline: every position counts, and there is one segment.
static std::vector<float> logits_of(Ort::Session& session, const json& inputs, Ids& ids) {
    Ids ones(ids.size(), 1), zeros(ids.size(), 0), shape = {1, int64_t(ids.size())};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<const char*> names;
    std::vector<Ort::Value> values;
    for (const json& name : inputs) {
        Ids& row = name == "input_ids" ? ids : name == "attention_mask" ? ones : zeros;
        names.push_back(name.get_ref<const std::string&>().c_str());
        values.push_back(Ort::Value::CreateTensor(memory, row.data(), row.size(), shape.data(), shape.size()));
    }
    const char* output = "logits";
    auto logits = std::move(session.Run({}, names.data(), values.data(), values.size(), &output, 1)[0]);
    auto first = logits.GetTensorData<float>();
    return {first, first + logits.GetTensorTypeAndShapeInfo().GetElementCount()};
}

int main(int count, char** arguments) try {
    refuse_if(count < 3, "usage: ./classify FOLDER HEADLINE …");
    std::string folder = arguments[1] + std::string("/");
    json manifest = json::parse(read(folder + "manifest.json")), recheck = manifest.value("recheck", json());
    json labels = json::parse(read(folder + "config.json")).at("id2label");
    WordPiece tokeniser(json::parse(read(folder + "tokenizer.json")), manifest.at("tokenizer"));

    setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // read when the environment is made; a user's own setting wins
    Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "classify");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1).AddConfigEntry("mlas.disable_kleidiai", "1");  // its kernels for SME change labels
    auto open = [&](std::string name) { return Ort::Session(environment, (folder + name).c_str(), options); };
    Ort::Session session = open(manifest.at("model_file")), exact(nullptr);
    if (!recheck.is_null()) exact = open(recheck.at("graph"));

    for (std::string text : std::vector(arguments + 2, arguments + count)) {
        auto wide = icu::UnicodeString::fromUTF8(text);
        auto start = wide.getBuffer(), end = start + wide.length();
        refuse_if(std::all_of(start, end, u_isUWhiteSpace), "a headline is empty");
        Ids ids = tokeniser.encode(text);
        auto started = std::chrono::steady_clock::now();
        auto logits = logits_of(session, manifest["tokenizer"].at("inputs"), ids), ordered = logits;
        std::sort(ordered.rbegin(), ordered.rend());
        bool rechecked = exact && ordered[0] - ordered[1] < recheck.at("threshold").get<double>();
        if (rechecked) logits = logits_of(exact, manifest["tokenizer"]["inputs"], ids);
        std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - started;
        auto best = std::max_element(logits.begin(), logits.end());
        double sum = 0;
        for (float logit : logits) sum += std::exp(double(logit) - *best);
        nlohmann::ordered_json probabilities, label = labels.at(std::to_string(best - logits.begin())), answer;
        for (size_t i = 0; i < logits.size(); ++i)
            probabilities[labels[std::to_string(i)]] = std::exp(double(logits[i]) - *best) / sum;
        answer = {{"text", text}, {"tokens", ids.size()}, {"label", label}, {"id", best - logits.begin()},
                  {"probabilities", probabilities}, {"ms", ms.count()}, {"rechecked", rechecked}};
        std::cout << answer << "\n";
    }
} catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << "\n";
    return 2;
}
