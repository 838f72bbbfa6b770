// Decides the cases of cases.jsonl by containerd's own pkg/filters and Go's regexp: reads them from standard input and
// writes them to standard output with new results.
//
//	GO111MODULE=off GOPATH=<unpacked golang-github-containerd-containerd-dev and what it needs> go run main.go
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/pkg/filters"
)

type row struct {
	Name   string            `json:"name"`
	Parent string            `json:"parent"`
	Kind   string            `json:"kind"`
	Labels map[string]string `json:"labels"`
}

type line struct {
	Rows   []row    `json:"rows,omitempty"`
	Filter []string `json:"filter,omitempty"`
	Regexp string   `json:"regexp,omitempty"`
	Value  string   `json:"value,omitempty"`
	Result any      `json:"result,omitempty"`
}

func (r row) Field(path []string) (string, bool) {
	switch path[0] {
	case "name":
		return r.Name, true
	case "parent":
		return r.Parent, true
	case "kind":
		return r.Kind, true
	case "labels":
		value, ok := r.Labels[strings.Join(path[1:], ".")]
		return value, ok
	}
	return "", false
}

func main() {
	in := bufio.NewScanner(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	var rows []row
	for in.Scan() {
		var c line
		if err := json.Unmarshal(in.Bytes(), &c); err != nil {
			panic(err)
		}
		switch {
		case c.Rows != nil:
			rows = c.Rows
		case c.Filter != nil:
			if filter, err := filters.ParseAll(c.Filter...); err != nil {
				c.Result = "error"
			} else {
				hits := []int{}
				for n, r := range rows {
					if filter.Match(r) {
						hits = append(hits, n)
					}
				}
				c.Result = hits
			}
		default:
			if re, err := regexp.Compile(c.Regexp); err != nil {
				c.Result = "error"
			} else {
				c.Result = re.MatchString(c.Value)
			}
		}
		if err := out.Encode(c); err != nil {
			panic(err)
		}
	}
}
