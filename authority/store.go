package authority

import (
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"

	_ "modernc.org/sqlite" // the driver "sqlite"

	"cal/approval/client"
	"cal/audit/witness"
	"cal/nucleus"
)

// store keeps asks, decisions and records in one SQLite file. Every change is
// durable when its method returns.
type store struct{ db *sql.DB }

var errUnknown = errors.New("unknown")

const schema = `
CREATE TABLE IF NOT EXISTS pods (
	pod TEXT PRIMARY KEY,
	keys TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS asks (
	id TEXT PRIMARY KEY,
	sha256 TEXT NOT NULL,
	canonical BLOB NOT NULL,
	request_sha256 TEXT NOT NULL UNIQUE,
	pod TEXT NOT NULL,
	op TEXT NOT NULL,
	summary TEXT NOT NULL,
	created_ms INTEGER NOT NULL,
	expires_ms INTEGER NOT NULL,
	state TEXT NOT NULL CHECK (state IN ('pending', 'granted', 'denied')),
	reason TEXT NOT NULL DEFAULT '',
	token TEXT NOT NULL DEFAULT '',
	jti TEXT UNIQUE,
	used_ms INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS asks_state ON asks (state, expires_ms);
CREATE TABLE IF NOT EXISTS logs (
	origin TEXT PRIMARY KEY,
	key TEXT NOT NULL,
	checkpoint BLOB
) STRICT;
CREATE TABLE IF NOT EXISTS record (
	seq INTEGER PRIMARY KEY,
	entry TEXT NOT NULL
) STRICT;`

func openStore(path string) (*store, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return nil, err
	}
	dsn := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: "_txlock=immediate&_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)"}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	db.SetMaxOpenConns(1)
	var check string
	err = db.QueryRow("PRAGMA quick_check(1)").Scan(&check)
	if err == nil && check != "ok" {
		err = errors.New(check)
	}
	if err == nil {
		_, err = db.Exec(schema)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), db.Close())
	}
	return &store{db}, nil
}

func (s *store) close() error { return s.db.Close() }

// Record implements Recorder.
func (s *store) Record(entry nucleus.Entry) error {
	raw, err := nucleus.Canonical(entry)
	if err != nil {
		return err
	}
	_, err = s.db.Exec("INSERT INTO record (entry) VALUES (?)", string(raw))
	return err
}

// addPod keeps keys unless the pod has some, and returns those it has.
func (s *store) addPod(pod, keys string) (string, error) {
	if _, err := s.db.Exec("INSERT INTO pods VALUES (?, ?) ON CONFLICT DO NOTHING", pod, keys); err != nil {
		return "", err
	}
	return s.podKeys(pod)
}

func (s *store) podKeys(pod string) (keys string, err error) {
	err = s.db.QueryRow("SELECT keys FROM pods WHERE pod = ?", pod).Scan(&keys)
	if errors.Is(err, sql.ErrNoRows) {
		return "", errUnknown
	}
	return keys, err
}

type askRow struct {
	id, digest       string
	canonical        []byte
	request          string // digest of what the requester signed
	pod              string
	op               nucleus.Op
	summary          string
	created, expires int64
	state            string
	reason, token    string
	grant            string
	used             int64
}

// status is what came of the ask at a time: one that nobody decided expires.
func (r askRow) status(now int64) client.Status {
	state := r.state
	if state == client.Pending && now >= r.expires {
		state = client.Expired
	}
	return client.Status{ID: r.id, State: state, AskDigest: r.digest, Grant: r.grant, Token: r.token, Reason: r.reason}
}

func (s *store) addAsk(r askRow) error {
	_, err := s.db.Exec("INSERT INTO asks (id, sha256, canonical, request_sha256, pod, op, summary, created_ms, expires_ms, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
		r.id, r.digest, r.canonical, r.request, r.pod, string(r.op), r.summary, r.created, r.expires, r.state)
	return err
}

// decide writes the decision on an ask that has none.
func (s *store) decide(r askRow) error {
	var grant any
	if r.grant != "" {
		grant = r.grant
	}
	result, err := s.db.Exec("UPDATE asks SET state = ?, reason = ?, token = ?, jti = ? WHERE id = ? AND state = 'pending'",
		r.state, r.reason, r.token, grant, r.id)
	return exactlyOne(result, err)
}

func (s *store) markUsed(grant string, now int64) error {
	result, err := s.db.Exec("UPDATE asks SET used_ms = ? WHERE jti = ? AND used_ms = 0", now, grant)
	return exactlyOne(result, err)
}

func exactlyOne(result sql.Result, err error) error {
	if err != nil {
		return err
	}
	n, err := result.RowsAffected()
	if err == nil && n != 1 {
		err = fmt.Errorf("%d rows changed, want 1", n)
	}
	return err
}

const askColumns = "SELECT id, sha256, canonical, pod, op, summary, created_ms, expires_ms, state, reason, token, COALESCE(jti, ''), used_ms FROM asks"

func (s *store) ask(id string) (askRow, error) {
	return scanAsk(s.db.QueryRow(askColumns+" WHERE id = ?", id))
}

func (s *store) grant(id string) (askRow, error) {
	return scanAsk(s.db.QueryRow(askColumns+" WHERE jti = ?", id))
}

func scanAsk(row *sql.Row) (r askRow, err error) {
	err = row.Scan(&r.id, &r.digest, &r.canonical, &r.pod, &r.op, &r.summary, &r.created, &r.expires, &r.state, &r.reason, &r.token, &r.grant, &r.used)
	if errors.Is(err, sql.ErrNoRows) {
		err = errUnknown
	}
	return r, err
}

func (s *store) askOfRequest(digest string) (id string, err error) {
	err = s.db.QueryRow("SELECT id FROM asks WHERE request_sha256 = ?", digest).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		err = errUnknown
	}
	return id, err
}

func (s *store) pending(now int64) (n int, err error) {
	return n, s.db.QueryRow("SELECT COUNT(*) FROM asks WHERE state = 'pending' AND expires_ms > ?", now).Scan(&n)
}

// list returns the asks in a state at a time, oldest first; empty for all.
func (s *store) list(state string, now int64) (items []client.Item, err error) {
	where, args := "", []any{}
	switch state {
	case "":
	case client.Pending:
		where, args = " WHERE state = 'pending' AND expires_ms > ?", []any{now}
	case client.Expired:
		where, args = " WHERE state = 'pending' AND expires_ms <= ?", []any{now}
	case client.Granted, client.Denied:
		where, args = " WHERE state = ?", []any{state}
	default:
		return nil, nucleus.Errorf(nucleus.KindInvalid, "unknown state %q", state)
	}
	//nolint:gosec // where is one of the constants above
	rows, err := s.db.Query("SELECT id, state, pod, op, summary, sha256, created_ms, expires_ms FROM asks"+where+" ORDER BY created_ms, id", args...)
	if err != nil {
		return nil, unavailable(err)
	}
	defer rows.Close()
	items = []client.Item{}
	for rows.Next() {
		var i client.Item
		if err := rows.Scan(&i.ID, &i.State, &i.Pod, &i.Op, &i.Summary, &i.AskDigest, &i.Created, &i.Expires); err != nil {
			return nil, unavailable(err)
		}
		i.State = askRow{state: i.State, expires: i.Expires}.status(now).State
		items = append(items, i)
	}
	return items, unavailable(rows.Err())
}

// Log implements witness.Store.
func (s *store) Log(origin string) (key string, signed []byte, err error) {
	err = s.db.QueryRow("SELECT key, checkpoint FROM logs WHERE origin = ?", origin).Scan(&key, &signed)
	if errors.Is(err, sql.ErrNoRows) {
		err = witness.ErrUnknownLog
	}
	return key, signed, err
}

// Keep implements witness.Store.
func (s *store) Keep(origin string, signed []byte) error {
	result, err := s.db.Exec("UPDATE logs SET checkpoint = ? WHERE origin = ?", signed, origin)
	return exactlyOne(result, err)
}

// addLog keeps a key unless the log has one, and returns the one it has.
func (s *store) addLog(origin, key string) (string, error) {
	if _, err := s.db.Exec("INSERT INTO logs (origin, key) VALUES (?, ?) ON CONFLICT DO NOTHING", origin, key); err != nil {
		return "", err
	}
	known, _, err := s.Log(origin)
	return known, err
}

func (s *store) forgetLog(origin string) error {
	_, err := s.db.Exec("DELETE FROM logs WHERE origin = ?", origin)
	return err
}
