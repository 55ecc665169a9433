-- read
--
-- Which of these migrations the database lacks.
--   $1 migrations  text[]
SELECT coalesce(array_agg(name ORDER BY name), '{}') AS names
  FROM unnest($1::text[]) AS wanted (name)
 WHERE NOT EXISTS (SELECT FROM _yoyo_migration WHERE migration_id = name);
