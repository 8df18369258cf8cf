package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// MaxDocument is the largest policy that Load reads.
const MaxDocument = 1 << 20

const maxDepth = 12

// A parser makes a node of hundreds of bytes of a mark and a letter. So the marks that
// can begin or end a value are counted before anything is parsed: a policy of 1,000 rules
// for hosts and 1,000 for commands has some 30,000. In JSON, the form that Canonical
// writes and whose reader needs less, there may be half as many more: what was
// read from YAML can be read back.
const (
	maxMarks     = 1 << 16
	maxMarksJSON = maxMarks + maxMarks/2
)

// checkMarks refuses a document with more than most marks. A dash is one only where
// something that is not printed stands behind it, else it is a letter of a word.
func checkMarks(data []byte, most int) error {
	marks, line := 0, 1
	for i, c := range data {
		switch c {
		case '\n':
			line++
			marks++
		case ',', '[', ']', '{', '}', ':', '?', '#', '&', '*', '!', '|', '>', '%', '\r':
			marks++
		case '-':
			if i+1 == len(data) || data[i+1] <= ' ' || data[i+1] > '~' {
				marks++
			}
		}
		if marks > most {
			return &lineError{line, fmt.Sprintf("the document has more than %d lines and marks (, : - [ ] { } and the like); no more are read", most)}
		}
	}
	return nil
}

// node is a value of a YAML or JSON document with the line that it stands on.
type node struct {
	kind  kind
	line  int
	text  string  // of a scalar
	keys  []node  // of a mapping, beside items
	items []*node // of a mapping or list
}

type kind string

const (
	mapping kind = "a mapping"
	list    kind = "a list"
	text    kind = "a string"
	number  kind = "a number"
	other   kind = "nothing" // null, true, false
)

func (n *node) errorf(format string, args ...any) error {
	return &lineError{n.line, fmt.Sprintf(format, args...)}
}

type lineError struct {
	line    int
	message string
}

// Error shows at most so much of a message that it can be read; what was wanted stands
// at its end.
func (e *lineError) Error() string {
	message := e.message
	const head, tail = 600, 300
	if cut := len(message) - head - tail; cut > 0 {
		message = strings.ToValidUTF8(message[:head], "") + fmt.Sprintf(" [cut: %d bytes] ", cut) + strings.ToValidUTF8(message[head+cut:], "")
	}
	return strconv.Itoa(e.line) + ": " + message
}

// describe is what a reader found, for messages.
func (n *node) describe() string {
	switch n.kind {
	case text:
		return strconv.Quote(n.text)
	case number:
		return "the number " + n.text
	case other:
		if n.text != "" && n.text != "null" && n.text != "~" {
			return n.text
		}
	}
	return string(n.kind)
}

// parse reads exactly one document. JSON is read by a JSON reader: YAML gives
// some of its escapes another meaning.
func parse(data []byte) (*node, error) {
	switch {
	case len(data) > MaxDocument:
		return nil, &lineError{1, fmt.Sprintf("the document has more than %d bytes; no more are read", MaxDocument)}
	case !utf8.Valid(data):
		return nil, &lineError{1, "the document is not UTF-8"}
	case json.Valid(data):
		if err := checkMarks(data, maxMarksJSON); err != nil {
			return nil, err
		}
		return parseJSON(data)
	}
	if err := checkMarks(data, maxMarks); err != nil {
		return nil, err
	}
	return parseYAML(data)
}

func parseYAML(data []byte) (*node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var document, second yaml.Node
	switch err := dec.Decode(&document); {
	case errors.Is(err, io.EOF):
		return nil, &lineError{1, "the document is empty"}
	case err != nil:
		return nil, yamlError(err, data)
	}
	switch err := dec.Decode(&second); {
	case err == nil:
		return nil, &lineError{second.Line, "a second document; want exactly one"}
	case !errors.Is(err, io.EOF):
		return nil, yamlError(err, data)
	}
	return fromYAML(document.Content[0], 1)
}

var yamlPlace = regexp.MustCompile(`^line (\d+): `)

var yamlAlias = regexp.MustCompile(`^unknown anchor '(.*)' referenced$`)

// yamlError moves the line that the parser found to the front of its message. A
// pattern that was not quoted reads as an alias.
func yamlError(err error, data []byte) error {
	const quote = `; a policy has no anchors and aliases, and a pattern that begins with * must be quoted`
	message := strings.TrimPrefix(err.Error(), "yaml: ")
	line := 1
	if place := yamlPlace.FindStringSubmatch(message); place != nil {
		line, _ = strconv.Atoi(place[1])
		message = message[len(place[0]):]
	}
	if alias := yamlAlias.FindStringSubmatch(message); alias != nil {
		before, _, _ := bytes.Cut(data, []byte("*"+alias[1]))
		line = 1 + bytes.Count(before, []byte("\n"))
		message = "alias *" + alias[1] + quote
	} else if strings.HasSuffix(message, "did not find expected alphabetic or numeric character") {
		message += quote
	}
	return &lineError{max(line, 1), "not YAML: " + message}
}

func fromYAML(y *yaml.Node, depth int) (*node, error) {
	n := &node{line: y.Line, text: y.Value}
	switch {
	case depth > maxDepth:
		return nil, n.errorf("nested deeper than %d", maxDepth)
	case y.Kind == yaml.AliasNode:
		return nil, n.errorf("alias *%s; a policy has no anchors and aliases", y.Value)
	case y.Anchor != "":
		return nil, n.errorf("anchor &%s; a policy has no anchors and aliases", y.Anchor)
	case y.Style&yaml.TaggedStyle != 0:
		return nil, n.errorf("tag %s; a policy has no tags", y.Tag)
	}
	switch y.Kind {
	case yaml.MappingNode:
		n.kind, n.keys, n.items = mapping, make([]node, 0, len(y.Content)/2), make([]*node, 0, len(y.Content)/2)
		for i := 0; i+1 < len(y.Content); i += 2 {
			key, err := fromYAML(y.Content[i], depth+1)
			if err != nil {
				return nil, err
			}
			value, err := fromYAML(y.Content[i+1], depth+1)
			if err != nil {
				return nil, err
			}
			n.keys, n.items = append(n.keys, *key), append(n.items, value)
		}
	case yaml.SequenceNode:
		n.kind, n.items = list, make([]*node, 0, len(y.Content))
		for _, item := range y.Content {
			value, err := fromYAML(item, depth+1)
			if err != nil {
				return nil, err
			}
			n.items = append(n.items, value)
		}
	default:
		switch y.ShortTag() {
		case "!!str", "!!timestamp":
			n.kind = text
		case "!!int", "!!float":
			n.kind = number
		case "!!merge":
			return nil, n.errorf("merge key <<; a policy has no merge keys")
		default:
			n.kind = other
		}
	}
	return n, nil
}

// jsonReader keeps count of lines beside the decoder.
type jsonReader struct {
	data []byte
	dec  *json.Decoder
	seen int64
	line int
}

func parseJSON(data []byte) (*node, error) {
	r := &jsonReader{data: data, dec: json.NewDecoder(bytes.NewReader(data)), line: 1}
	r.dec.UseNumber()
	return r.value(1)
}

func (r *jsonReader) token() (json.Token, error) {
	token, err := r.dec.Token()
	end := r.dec.InputOffset()
	r.line += bytes.Count(r.data[r.seen:end], []byte("\n"))
	r.seen = end
	return token, err
}

func (r *jsonReader) value(depth int) (*node, error) {
	token, err := r.token()
	if err != nil {
		return nil, &lineError{r.line, err.Error()}
	}
	n := &node{line: r.line}
	if depth > maxDepth {
		return nil, n.errorf("nested deeper than %d", maxDepth)
	}
	switch t := token.(type) {
	case json.Delim:
		n.kind = list
		if t == '{' {
			n.kind = mapping
		}
		for r.dec.More() {
			if n.kind == mapping {
				key, err := r.value(depth + 1)
				if err != nil {
					return nil, err
				}
				n.keys = append(n.keys, *key)
			}
			item, err := r.value(depth + 1)
			if err != nil {
				return nil, err
			}
			n.items = append(n.items, item)
		}
		_, err = r.token()
	case string:
		n.kind, n.text = text, t
	case json.Number:
		n.kind, n.text = number, t.String()
	default:
		n.kind, n.text = other, "null"
		if t != nil {
			n.text = fmt.Sprint(t)
		}
	}
	return n, err
}

// field is one key that a mapping may have.
type field struct {
	key  string
	read func(*node) error
}

// fields reads a mapping. Keys that are unknown or come twice are errors.
func (n *node) fields(what string, known ...field) error {
	if n.kind != mapping {
		return n.errorf("%s is %s; want a mapping with the keys %s", what, n.describe(), keyNames(known))
	}
	seen := make(map[string]int, len(n.keys))
	for i := range n.keys {
		key := &n.keys[i]
		if key.kind != text {
			return key.errorf("the key of %s is %s; want one of %s", what, key.describe(), keyNames(known))
		}
		if line, twice := seen[key.text]; twice {
			return key.errorf("%s has the key %q twice, first in line %d", what, key.text, line)
		}
		seen[key.text] = key.line
		read := lookup(known, key.text)
		if read == nil {
			return key.errorf("%s has the unknown key %q; want one of %s", what, key.text, keyNames(known))
		}
		if err := read(n.items[i]); err != nil {
			return err
		}
	}
	return nil
}

func lookup(known []field, key string) func(*node) error {
	for _, f := range known {
		if f.key == key {
			return f.read
		}
	}
	return nil
}

func keyNames(known []field) string {
	names := make([]string, len(known))
	for i, f := range known {
		names[i] = f.key
	}
	return strings.Join(names, ", ")
}

// str reads a string. Control characters have no use in a policy and lone
// surrogates arrive as U+FFFD.
func (n *node) str(what string) (string, error) {
	if n.kind != text {
		return "", n.errorf("%s is %s; want a string (quote it)", what, n.describe())
	}
	if i := strings.IndexFunc(n.text, func(r rune) bool { return unicode.IsControl(r) || r == utf8.RuneError }); i >= 0 {
		return "", n.errorf("%s %q has a control or replacement character at byte %d", what, n.text, i)
	}
	return n.text, nil
}

// integer reads a plain decimal number; 0x1F, 1_000, 1e3 and 1.0 are none.
func (n *node) integer(what string, low, high int64) (int64, error) {
	value, err := strconv.ParseInt(n.text, 10, 64)
	if n.kind != number || err != nil || n.text != strconv.FormatInt(value, 10) || value < low || value > high {
		return 0, n.errorf("%s is %s; want a whole number from %d to %d", what, n.describe(), low, high)
	}
	return value, nil
}

// elements reads a list of at most maxRules items.
func (n *node) elements(what, example string) ([]*node, error) {
	if n.kind != list {
		return nil, n.errorf("%s is %s; want a list like %s", what, n.describe(), example)
	}
	if len(n.items) > maxRules {
		return nil, n.errorf("%s has %d entries; at most %d are read", what, len(n.items), maxRules)
	}
	return n.items, nil
}
