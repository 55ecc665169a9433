-- depends: 0003.search-and-export
-- The Idempotency-Keys that callers have used, each with what it made and a digest of its request.
-- A table of its own, so that a request without a key pays nothing.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    actor      text NOT NULL,
    key        text NOT NULL CHECK (char_length(key) BETWEEN 1 AND 255),
    digest     bytea NOT NULL,
    made_id    bigint NOT NULL,
    replays    integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (actor, key)
);
