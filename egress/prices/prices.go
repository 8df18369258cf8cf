// Package prices says what calls to models cost. It is pure: the table is data, the
// built-in one or a person's own over it.
//
// Claim: a call never costs less than it did. What the table does not know - a model, a
// kind of service - is charged like the dearest that it knows, and said to be so; what is
// not a whole millionth of a dollar is rounded up.
//
// What providers charge beside tokens (searches of their own tools, storage) is not in it.
package prices

import (
	_ "embed"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"cal/egress"
)

//go:embed prices.yaml
var builtin []byte

// Table holds prices by model. Make one with Builtin or Parse.
type Table struct {
	checked    string
	models     map[string]price
	surcharges map[string]int64 // factors in thousandths, by kind of service
}

// rates are in millionths of a dollar for a million tokens.
type rates struct{ input, output, cacheRead, cacheWrite, cacheHour int64 }

type price struct {
	rates
	above int64 // tokens of input beyond which long holds; 0: never
	long  rates
}

// Builtin is the table that the program brings.
func Builtin() *Table {
	t, err := Parse("prices.yaml", builtin)
	if err != nil {
		panic(err) // held by a test
	}
	return t
}

// Checked is the day on which somebody compared the table with what is published.
func (t *Table) Checked() string { return t.checked }

// Over returns own over t: a model or a kind of service that own names is as own has it.
func (t *Table) Over(own *Table) *Table {
	whole := &Table{checked: t.checked, models: map[string]price{}, surcharges: map[string]int64{}}
	for _, from := range []*Table{t, own} {
		for name, p := range from.models {
			whole.models[name] = p
		}
		for name, factor := range from.surcharges {
			whole.surcharges[name] = factor
		}
	}
	return whole
}

// snapshot is the date behind the name of a model's snapshot, or what marks a larger
// context.
var snapshot = regexp.MustCompile(`(-20[0-9]{6}|-20[0-9]{2}-[0-9]{2}-[0-9]{2}|-latest)?(\[1m\])?$`)

// Cost is what a call of tokens costs, in millionths of a dollar. service names the kinds of
// service that it had, joined with "+", "" for none. known is false where the model or a
// service is not in the table: then the dearest stands for it.
func (t *Table) Cost(model, service string, tokens egress.Tokens) (microUSD int64, known bool) {
	p, known := t.models[model]
	if !known {
		p, known = t.models[snapshot.ReplaceAllString(model, "")]
	}
	r := p.rates
	if whole := tokens.Input + tokens.CacheRead + tokens.CacheWrite; p.above > 0 && whole > p.above {
		r = p.long
	}
	if !known {
		r = t.dearest()
	}
	hour := min(tokens.CacheHour, tokens.CacheWrite)
	sum := tokens.Input*r.input + tokens.Output*r.output + tokens.CacheRead*r.cacheRead + (tokens.CacheWrite-hour)*r.cacheWrite + hour*r.cacheHour
	cost := ceil(sum, 1e6)
	if service == "" {
		return cost, known
	}
	for kind := range strings.SplitSeq(service, "+") {
		factor, named := t.surcharges[kind]
		if !named {
			factor, known = t.dearestService(), false
		}
		if factor > 0 && cost > (math.MaxInt64-1000)/factor {
			return math.MaxInt64, known
		}
		cost = ceil(cost*factor, 1000)
	}
	return cost, known
}

func ceil(n, by int64) int64 { return (n + by - 1) / by }

// dearest has the highest of each rate.
func (t *Table) dearest() rates {
	var d rates
	for _, p := range t.models {
		for _, r := range []rates{p.rates, p.long} {
			d = rates{max(d.input, r.input), max(d.output, r.output), max(d.cacheRead, r.cacheRead), max(d.cacheWrite, r.cacheWrite), max(d.cacheHour, r.cacheHour)}
		}
	}
	return d
}

func (t *Table) dearestService() int64 {
	most := int64(1000)
	for _, f := range t.surcharges {
		most = max(most, f)
	}
	return most
}

// Bounds of a table: with them, and with the most tokens that package egress reports of a
// call, no sum overflows.
const (
	maxRate   = 1_000 * 1e6
	maxFactor = 100
	maxFile   = 1 << 20
)

// Parse reads a table. name stands in errors, which have the form
// "NAME:LINE: what is so; what was wanted".
func Parse(name string, data []byte) (*Table, error) {
	t := &Table{models: map[string]price{}, surcharges: map[string]int64{}}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s: has more than %d bytes", name, maxFile)
	}
	var document yaml.Node
	if err := yaml.Unmarshal(data, &document); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(document.Content) == 0 {
		return nil, fmt.Errorf("%s:1: the file is empty; want models: [{names: [NAME], input: USD, output: USD}]", name)
	}
	err := fields(document.Content[0], "the file", map[string]func(*yaml.Node) error{
		"checked":    func(n *yaml.Node) error { return t.date(n) },
		"models":     func(n *yaml.Node) error { return each(n, yaml.SequenceNode, "models", t.model) },
		"surcharges": func(n *yaml.Node) error { return t.readSurcharges(n) },
	})
	if err != nil {
		return nil, fmt.Errorf("%s:%w", name, err)
	}
	return t, nil
}

func errorf(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("%d: %s", n.Line, fmt.Sprintf(format, args...))
}

// fields reads a mapping whose keys are known.
func fields(n *yaml.Node, what string, known map[string]func(*yaml.Node) error) error {
	if n.Kind != yaml.MappingNode {
		return errorf(n, "%s is no mapping", what)
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		read := known[key.Value]
		switch {
		case read == nil:
			var names []string
			for name := range known {
				names = append(names, name)
			}
			slices.Sort(names)
			return errorf(key, "%s has the unknown key %q; want one of %s", what, key.Value, strings.Join(names, ", "))
		case seen[key.Value]:
			return errorf(key, "%s has the key %q twice", what, key.Value)
		}
		seen[key.Value] = true
		if err := read(n.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}

func each(n *yaml.Node, kind yaml.Kind, what string, read func(*yaml.Node) error) error {
	if n.Kind != kind {
		return errorf(n, "%s is no list", what)
	}
	for _, item := range n.Content {
		if err := read(item); err != nil {
			return err
		}
	}
	return nil
}

func (t *Table) date(n *yaml.Node) error {
	if _, err := time.Parse(time.DateOnly, n.Value); n.Kind != yaml.ScalarNode || err != nil {
		return errorf(n, "checked is %q; want a day like 2026-01-31", n.Value)
	}
	t.checked = n.Value
	return nil
}

func (t *Table) model(n *yaml.Node) error {
	var p price
	var names []*yaml.Node
	known := p.fields()
	var named, long bool
	known["names"] = func(n *yaml.Node) error {
		named = true
		return each(n, yaml.SequenceNode, "names", func(n *yaml.Node) error {
			if n.Kind != yaml.ScalarNode || n.Value == "" || len(n.Value) > 256 {
				return errorf(n, "a name is %q; want the name of a model", n.Value)
			}
			names = append(names, n)
			return nil
		})
	}
	known["long"] = func(n *yaml.Node) error {
		long = true
		inner := price{}
		of := inner.fields()
		of["above"] = func(n *yaml.Node) (err error) {
			if p.above, err = strconv.ParseInt(n.Value, 10, 64); err != nil || p.above < 1 || p.above > 1e9 {
				return errorf(n, "above is %q; want a number of tokens from 1 to 1000000000", n.Value)
			}
			return nil
		}
		if err := fields(n, "long", of); err != nil {
			return err
		}
		p.long = inner.complete()
		return nil
	}
	if err := fields(n, "a model", known); err != nil {
		return err
	}
	switch {
	case !named || len(names) == 0:
		return errorf(n, "a model has no names")
	case p.input < 0 || p.output < 0:
		return errorf(n, "model %s has no price of input or of output", names[0].Value)
	case long && (p.above == 0 || p.long.input < 0 || p.long.output < 0):
		return errorf(n, "long of model %s lacks above, input or output", names[0].Value)
	}
	p.rates = p.complete()
	for _, name := range names {
		if _, twice := t.models[name.Value]; twice {
			return errorf(name, "model %s is there twice", name.Value)
		}
		t.models[name.Value] = p
	}
	return nil
}

// fields are the readers of the rates, which are -1 until they are read.
func (p *price) fields() map[string]func(*yaml.Node) error {
	p.rates = rates{-1, -1, -1, -1, -1}
	known := map[string]func(*yaml.Node) error{}
	for name, to := range map[string]*int64{
		"input": &p.input, "output": &p.output, "cache_read": &p.cacheRead, "cache_write": &p.cacheWrite, "cache_write_1h": &p.cacheHour,
	} {
		known[name] = func(n *yaml.Node) (err error) {
			*to, err = decimal(n, name, 1e6, maxRate)
			return err
		}
	}
	return known
}

// complete has the dearer neighbour for what is left out: reads and writes of a cache
// cost what input does, at least.
func (p *price) complete() rates {
	r := p.rates
	if r.cacheRead < 0 {
		r.cacheRead = r.input
	}
	if r.cacheWrite < 0 {
		r.cacheWrite = r.input
	}
	if r.cacheHour < 0 {
		r.cacheHour = max(r.cacheWrite, 2*r.input)
	}
	return r
}

func (t *Table) readSurcharges(n *yaml.Node) error {
	if n.Kind != yaml.MappingNode {
		return errorf(n, "surcharges is no mapping")
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		name := n.Content[i].Value
		if _, twice := t.surcharges[name]; twice {
			return errorf(n.Content[i], "surcharges has the key %q twice", name)
		}
		factor, err := decimal(n.Content[i+1], "surcharges."+name, 1e3, maxFactor*1e3)
		if err != nil {
			return err
		}
		t.surcharges[name] = factor
	}
	return nil
}

var amount = regexp.MustCompile(`^(0|[1-9][0-9]{0,5})(\.[0-9]{1,6})?$`)

// decimal reads a number exactly, in parts of 1/scale.
func decimal(n *yaml.Node, what string, scale, most int64) (int64, error) {
	digits := len(fmt.Sprint(scale)) - 1
	whole, fraction, _ := strings.Cut(n.Value, ".")
	value, err := strconv.ParseInt(whole+(fraction + "000000")[:digits], 10, 64)
	if n.Kind != yaml.ScalarNode || n.Tag == "!!str" || !amount.MatchString(n.Value) || len(fraction) > digits || err != nil || value > most {
		return 0, errorf(n, "%s is %q; want a number from 0 to %d, with %d decimals at most", what, n.Value, most/scale, digits)
	}
	return value, nil
}
